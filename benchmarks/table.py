"""Every row of speed beside transformers, and how both grow, in one run: benchmarks/table.md, .json and .png.

    make bench                                  about eight minutes on two quiet cores
    python -m benchmarks.table [--rows forward,vision] [--layers 4] [--pairs 5] [--growth] [--torch-compile] [--one-core] [--add]

Both sides have the same float32 weights, inputs and number of threads. Theirs runs in inference mode and in the fastest of its
settings (experts grouped_mm or eager, attention sdpa or eager), chosen by a trial before each row. A pair measures both
within seconds of each other, first one first, then the other, so that a busy machine slows both; the ratio is that of the
medians. Models are a quarter as wide as Qwen3-VL-30B-A3B, with its 128 experts, 8 of them per token.
"""

from __future__ import annotations

import benchmarks.machine as machine  # isort: skip - first: it sets threads and platform before jax is imported

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import file_rows, growth, rows
from benchmarks.pairs import Timed

HERE = Path(__file__).resolve().parent
ROWS: dict[str, Callable[[rows.Sizes], Iterator[Timed]]] = {
    **rows.ROWS,
    "processor": file_rows.processor,
    "files": file_rows.files,
}


def rate(seconds: float, per: tuple[float, str]) -> str:
    """How many units per second, in three digits."""
    value = per[0] / seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_markdown(timed: Sequence[Timed]) -> str:
    """One line per row."""
    lines = [
        "| | unit | ours, per s | transformers, per s | its setting | ratio | pairs: least, most | goal | compile s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in timed:
        own, other = (rate(statistics.median(side), row.per) for side in (row.ours, row.theirs))
        low, high = row.spread
        lines.append(
            f"| {row.name} | {row.per[1]} | {own} | {other} | {row.setting} | **{row.ratio:.2f}** | {low:.2f}, {high:.2f} | "
            f"{row.goal:.1f} | {row.compile_seconds:.1f} |"
        )
    return "\n".join(lines)


def curves_as_markdown(curves: Sequence[growth.Curve]) -> str:
    """Milliseconds of both against what grows."""
    lines = []
    for curve in curves:
        lines += [
            f"Against {curve.what}: exponents {curve.exponent(curve.ours):.2f} ours, {curve.exponent(curve.theirs):.2f} theirs.",
            "",
            "| | " + " | ".join(map(str, curve.sizes)) + " |",
            "|---|" + "---|" * len(curve.sizes),
            *(
                f"| {name}, ms | " + " | ".join(f"{1e3 * s:.0f}" for s in side) + " |"
                for name, side in (("ours", curve.ours), ("transformers", curve.theirs))
            ),
            "",
        ]
    return "\n".join(lines)


def as_json(timed: Sequence[Timed], curves: Sequence[growth.Curve]) -> dict[str, Any]:
    """Everything measured."""
    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "rows": [{**vars(row), "ratio": row.ratio, "spread": row.spread} for row in timed],
        "growth": [vars(curve) for curve in curves],
    }


def draw(timed: Sequence[Timed], curves: Sequence[growth.Curve], file: Path) -> None:
    """Ratios as bars, and the growth curves beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = max(3.0, 0.28 * len(timed) + 1)
    figure, axes = plt.subplots(
        1, 1 + len(curves), figsize=(6 + 3 * len(curves), height), dpi=120, layout="constrained", squeeze=False
    )
    bars = axes[0, 0]
    names, ratios = [row.name for row in timed], [row.ratio for row in timed]
    below = [max(0.0, row.ratio - row.spread[0]) for row in timed]
    above = [max(0.0, row.spread[1] - row.ratio) for row in timed]
    colours = ["#0b62a4" if ratio >= 1 else "#a83232" for ratio in ratios]
    bars.barh(names, ratios, xerr=[below, above], color=colours, ecolor="#999999")
    bars.axvline(1, color="black", linewidth=0.8)
    bars.invert_yaxis()
    bars.set_xlabel("times as fast as transformers")
    for axis, curve in zip(axes[0, 1:], curves, strict=True):
        axis.loglog(curve.sizes, curve.ours, "o-", color="#0b62a4", label="ours")
        axis.loglog(curve.sizes, curve.theirs, "o-", color="#999999", label="transformers")
        axis.set(xlabel=curve.what, ylabel="seconds")
        axis.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
        axis.set_xticks([], minor=True)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="which of " + ", ".join(ROWS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=15.0, help="seconds a row may take once it has three pairs")
    parser.add_argument("--growth", action="store_true", help="also time both against tokens, pictures, experts, layers, batch")
    parser.add_argument("--torch-compile", action="store_true", help="also try torch.compile on the forward pass (minutes)")
    parser.add_argument("--one-core", action="store_true", help="one thread each, CPU seconds: for a machine that others use")
    parser.add_argument("--add", action="store_true", help="keep what the last run measured and this one does not")
    parser.add_argument("--out", type=Path, default=HERE / "table", help="writes this name with .md, .json and .png")
    args = parser.parse_args()
    if unknown := set(args.rows.split(",")) - {*ROWS, ""}:
        parser.error(f"--rows: {', '.join(sorted(unknown))} unknown, expected some of {', '.join(ROWS)}")
    for name in ("layers", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}, expected 1 or more")
    if not args.out.parent.is_dir():  # known before the minutes of measuring
        parser.error(f"--out {args.out}: {args.out.parent} is no directory")
    sizes = rows.Sizes(layers=args.layers, pairs=args.pairs, limit=args.limit, torch_compile=args.torch_compile)
    timed, curves = earlier(args.out) if args.add else ({}, [])
    for name in filter(None, args.rows.split(",")):
        for row in ROWS[name](sizes):
            print(f"{row.name}: {row.ratio:.2f} of transformers' rate ({row.setting}), pairs {row.spread}", flush=True)
            timed[row.name] = row
            write(args.out, list(timed.values()), curves, sizes)  # a run that is cut short leaves what it has
    curves = list(growth.curves(sizes)) if args.growth else curves
    write(args.out, list(timed.values()), curves, sizes)
    print(args.out.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


def earlier(out: Path) -> tuple[dict[str, Timed], list[growth.Curve]]:
    """The rows of an earlier run, by name, and its curves; none where there was none."""
    file = out.with_suffix(".json")
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": [], "growth": []}
    fields = {field.name for field in dataclasses.fields(Timed)}
    timed = {row["name"]: Timed(**{name: value for name, value in row.items() if name in fields}) for row in found["rows"]}
    return timed, [growth.Curve(**curve) for curve in found["growth"]]


def write(out: Path, timed: Sequence[Timed], curves: Sequence[growth.Curve], sizes: rows.Sizes) -> None:
    """The three files."""
    where = machine.machine()
    lines = [
        "# Speed beside transformers",
        "",
        "```sh",
        f"python -m benchmarks.table {' '.join(sys.argv[1:])}".rstrip(),
        "```",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['clock']}, load {where['load']} at the end; "
        + ", ".join(f"{name} {version}" for name, version in machine.versions().items())
        + f". {sizes.layers} layers, float32, up to {sizes.pairs} pairs. A ratio above 1: ours is faster. What is measured: the "
        "first lines of `benchmarks/table.py`, `rows.py` and `file_rows.py`.",
        "",
        as_markdown(timed),
        "",
        *([curves_as_markdown(curves)] if curves else []),
    ]
    out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(as_json(timed, curves), indent=1) + "\n", encoding="utf-8")
    draw(timed, curves, out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
