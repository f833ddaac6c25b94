"""Draws docs/parity.png: how far each position's logits are from transformers in float64, and what a bug would cost.

python docs/plot_parity.py        (`make figure`; needs torch and matplotlib)

The checkpoint, picture and question are those of examples/demo.py. The yardstick is transformers in float64. Plotted against it:
this package in float32, transformers itself in float32, and transformers in float64 with one bug put in.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from demo import BOUND, IMAGE, QUESTION, run_model, run_transformers  # noqa: E402
from prompt import encode  # noqa: E402
from tiny_checkpoint import write_checkpoint  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def no_deepstack(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """The vision features are not added after the first decoder layers."""
    model.model.language_model._deepstack_process = lambda hidden, *_: hidden


def flat_positions(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Every token counts up by one on all three axes, as in a text model."""
    length = tensors["input_ids"].shape[1]
    tensors["position_ids"] = torch.arange(length).expand(3, 1, length)


def tanh_in_merger(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """The approximate GELU of the vision blocks, used in the mergers too."""
    for merger in (model.model.visual.merger, *model.model.visual.deepstack_merger_list):
        merger.act_fn = torch.nn.GELU(approximate="tanh")


BUGS: dict[str, Callable[[Any, dict[str, torch.Tensor]], None]] = {
    "no DeepStack": no_deepstack,
    "1-D positions": flat_positions,
    "tanh GELU in the mergers": tanh_in_merger,
}


def measure() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Name -> largest |difference| at each position `[T]`, and which positions hold the picture `[T]`."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory)
        write_checkpoint(source)
        with Image.open(IMAGE) as image:
            inputs, tokenizer = encode(source, image, QUESTION)
        truth = run_transformers(source, inputs, "float64")
        logits = {
            "qvlmoe_jax, float32": run_model(source, inputs)[0],
            f"transformers {transformers.__version__}, float32": run_transformers(source, inputs),
            **{name: run_transformers(source, inputs, "float64", bug) for name, bug in BUGS.items()},
        }
    visual = inputs["input_ids"][0] == tokenizer.token_to_id("<|image_pad|>")
    return {name: np.abs(values - truth).max(-1) for name, values in logits.items()}, visual


def draw(errors: dict[str, np.ndarray], visual: np.ndarray, file: Path) -> None:
    """Error against position on a logarithmic axis; the bugs are labelled at their own curves."""
    ours, theirs, *bugs = errors
    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=150, layout="constrained")
    columns = np.flatnonzero(visual)
    axes.axvspan(columns[0] - 0.5, columns[-1] + 0.5, color="#f0f0f0", zorder=0)
    axes.text(columns.mean(), 1.6e-7, "picture tokens", ha="center", color="#777777", fontsize=8)
    positions = np.arange(len(visual))
    for name, colour in zip(bugs, ("#a83232", "#d97b29", "#b08900"), strict=True):
        shown = np.where(errors[name] > 0, errors[name], np.nan)  # before the picture a bug in its handling changes nothing
        axes.plot(positions, shown, color=colour, linewidth=1.2)
        axes.text(len(visual) + 0.5, np.nanmedian(shown), f"bug: {name}", color=colour, fontsize=8, va="center")
    for name, colour, size in ((theirs, "#999999", 4), (ours, "#0b62a4", 3)):
        label = f"{name}: at most {errors[name].max():.1e}"
        axes.plot(positions, errors[name], "o", color=colour, markersize=size, label=label)
    axes.axhline(BOUND, color="black", linewidth=0.8, linestyle="--")
    axes.text(0, BOUND * 1.2, "the tests' bound, 1e-4", fontsize=8, va="bottom")
    axes.set(yscale="log", ylim=(1e-7, 20), xlim=(-1, len(visual)), xlabel="position in the prompt")
    axes.set_ylabel("largest |logit difference|\nto transformers in float64")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(0.0, 0.31), borderpad=0)
    figure.savefig(file, metadata={"Software": None})


def main() -> None:
    """Measures, draws, and prints the numbers behind the picture."""
    errors, visual = measure()
    draw(errors, visual, HERE / "parity.png")
    for name, values in errors.items():
        print(f"{name:42} largest {values.max():.1e}  median {np.median(values):.1e}")


if __name__ == "__main__":
    main()
