"""How a training step grows with devices and with experts: program size, compile time, step time. Eight host devices.

    python benchmarks/mesh.py [--write benchmarks/mesh.md] [--steps 5]

The batch stays the same (8 rows of 64 columns of text), so more devices do the same work in smaller pieces on the same cores:
what grows is overhead. Exponents are slopes of log(figure) over log(count) between the ends of a series.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is no installed package

from tests.xla_flags import EIGHT_DEVICES

if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", "64")  # threads for collectives that wait for one another
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}"

import jax
import jax.numpy as jnp

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig
from qvlmoe_jax.sharding import make_mesh, shard_batch, tree_shardings
from tests import cases, ours, tiny, training
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig
from train.optim import make_optimizer
from train.state import init_state
from train.step import make_train_step

Sizes = dict[str, int]
DEVICES: dict[str, list[Sizes]] = {
    "fsdp": [{}, {"fsdp": 2}, {"fsdp": 4}, {"fsdp": 8}],
    "expert, all-gather": [{}, {"expert": 2}, {"expert": 4}, {"expert": 8}],
    "expert, all-to-all": [{}, {"expert": 2}, {"expert": 4}, {"expert": 8}],
    "data": [{}, {"data": 2}, {"data": 4}, {"data": 8}],
}
EXPERTS = [8, 16, 32, 64, 128]
ROWS: list[list[Any]] = [[cases.Text(64 - row)] for row in range(8)]


@dataclass
class Measured:
    """
    Attributes:
      lines: of the optimised program.
      compile_seconds: of processor time, all threads; lowering not counted.
      step_seconds: median after the first step.
    """

    lines: int
    compile_seconds: float
    step_seconds: float


def measure(sizes: Sizes, *, experts: int = 8, dispatch: str = "allgather", steps: int = 0, options: Any = None) -> Measured:
    """Compiles the step of a small model for the mesh ({} = no mesh) and runs it `steps` times (0: step_seconds is NaN)."""
    described = tiny.variant(
        training.SMALL,
        text_config={"num_experts": experts},
        vision_config={"depth": 2, "deepstack_visual_indexes": [0]},
    )
    config = Qwen3VLMoeConfig.from_hf(described)
    backend = BackendConfig(dispatch=dispatch, remat="full")  # pyright: ignore[reportArgumentType]
    mesh = make_mesh(**dict[str, Any](sizes)) if sizes else None
    optimizer = OptimizerConfig(learning_rate=1e-4)
    tx = make_optimizer(optimizer)
    inputs = cases.build(described, ROWS)
    labels = cases.shifted_labels(inputs, described)
    batch = training.stacked([Batch.from_hf(config, **inputs, labels=labels, groups=8, text_length=64)])
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        model = ours.build_model(described, random_hf_tensors(described), backend)
        params = model.params()
        if mesh is not None:
            params = jax.tree.map(jax.device_put, params, tree_shardings(params, mesh))
        state = init_state(params, tx, mesh=mesh)
        batch = jax.tree.map(jnp.asarray, batch) if mesh is None else shard_batch(batch, mesh)
        step = make_train_step(
            model, tx, lambda _: jnp.float32(1e-4), loss=LossConfig(aux_loss=0.01), optimizer=optimizer, state=state, mesh=mesh
        )
        lowered = step.lower(state, batch)
        start = time.process_time()
        compiled = lowered.compile(compiler_options=options)
        seconds = time.process_time() - start
        times = []
        for _ in range(steps + 1 if steps else 0):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics["loss"])
            times.append(time.perf_counter() - start)
    return Measured((compiled.as_text() or "").count("\n"), seconds, statistics.median(times[1:]) if times else math.nan)


def exponent(small: float, large: float, ratio: float) -> float:
    """p such that `large / small == ratio ** p`."""
    return math.log(large / small) / math.log(ratio)


def table(counts: list[int], rows: list[Measured], name: str) -> str:
    """One series as Markdown, with its exponents from the second row (the first with a mesh) or, for experts, the first."""
    lines = [f"| {name} | HLO lines | compile CPU s | step s |", "|---|---|---|---|"]
    lines += [f"| {n} | {m.lines} | {m.compile_seconds:.1f} | {m.step_seconds:.3f} |" for n, m in zip(counts, rows, strict=True)]
    first = next(i for i, n in enumerate(counts) if n > 1)
    ratio = counts[-1] / counts[first]
    slopes = [
        exponent(getattr(rows[first], key), getattr(rows[-1], key), ratio) for key in ("lines", "compile_seconds", "step_seconds")
    ]
    return "\n".join([*lines, f"| exponent, {counts[first]} to {counts[-1]} | " + " | ".join(f"{p:.2f}" for p in slopes) + " |"])


def main() -> None:
    """Measures every series and prints, or writes, the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    one = measure({}, steps=arguments.steps)
    parts = []
    for name, meshes in DEVICES.items():
        dispatch = "all_to_all" if "to-all" in name else "allgather"
        rows = [one] + [measure(sizes, dispatch=dispatch, steps=arguments.steps) for sizes in meshes[1:]]
        parts.append(f"### Devices on {name}\n\n" + table([1, 2, 4, 8], rows, "devices"))
        print(parts[-1], flush=True)
    for name, sizes in (("one device", {}), ("expert4", {"expert": 4})):
        rows = [measure(sizes, experts=n, steps=arguments.steps) for n in EXPERTS]
        parts.append(f"### Experts on {name}\n\n" + table(EXPERTS, rows, "experts"))
        print(parts[-1], flush=True)
    if arguments.write:
        head = (
            "# Growth of a training step with devices and experts\n\n`python benchmarks/mesh.py --write benchmarks/mesh.md` "
            f"measures it again.\n\n```\n{(__doc__ or '').strip()}\n```\n\n{platform.machine()}, {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, jax {jax.__version__}; median of {arguments.steps} "
            "steps after the first.\n\n"
        )
        arguments.write.write_text(head + "\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
