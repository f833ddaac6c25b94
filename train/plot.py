"""`python -m train plot RUN`: the curves of a run as `RUN/curves.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import TrainingError
from train.metrics import METRICS_FILE, read_metrics


def _series(lines: Sequence[dict[str, Any]], kind: str, key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], float(line[key])) for line in lines if line["kind"] == kind and line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot(run: str | Path) -> Path:
    """Draws loss, accuracy, gradient norm, learning rate, throughput and router load; returns the picture's path.

    Raises:
      TrainingError: the run has no metrics, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainingError("plot needs the package matplotlib, which is not installed; pip install matplotlib") from None
    lines = read_metrics(run)
    if not lines:
        raise TrainingError(f"{Path(run) / METRICS_FILE}: no metrics, expected the directory of a run that has logged a step")

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 3)
    plan = [
        ("loss (nats per token)", [("train", "loss"), ("validation", "validation_loss")]),
        ("accuracy", [("train", "accuracy"), ("validation", "token_accuracy"), ("validation", "exact_match")]),
        ("gradient norm", [("train", "grad_norm")]),
        ("learning rate", [("train", "learning_rate")]),
        ("tokens per second", [("train", "tokens_per_second")]),
    ]
    for panel, (title, curves) in zip(panels.flat, plan, strict=False):
        for kind, key in curves:
            steps, values = _series(lines, kind, key)
            if steps:
                panel.plot(
                    steps, values, label=f"{kind} {key}" if len(curves) > 1 else None, marker="o" if len(steps) == 1 else ""
                )
        panel.set(title=title, xlabel="step")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    panels.flat[0].set_yscale("log")
    routers = [(line["step"], line["router"]["max_over_mean"]) for line in lines if line.get("router")]
    if routers:
        load = np.array([layers for _, layers in routers], float)  # what is not finite is text in the file
        for layer in range(load.shape[1]):
            panels.flat[5].plot([step for step, _ in routers], load[:, layer], linewidth=0.8)
    panels.flat[5].set(title="busiest expert / mean, per layer", xlabel="step")
    path = Path(run) / "curves.png"
    figure.savefig(path, dpi=110)
    return path
