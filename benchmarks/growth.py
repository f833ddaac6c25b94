"""How both sides' forward pass grows: with tokens, pictures, experts, layers and rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.models import Both, quarter
from benchmarks.pairs import compare
from benchmarks.rows import Sizes
from qvlmoe_jax import Batch
from tests import cases, reference


@dataclass(frozen=True)
class Curve:
    """Median seconds of both at each size of `what`."""

    what: str
    sizes: list[int]
    ours: list[float]
    theirs: list[float]

    def exponent(self, side: list[float]) -> float:
        """Of the power law through the points."""
        return float(np.polyfit(np.log(self.sizes), np.log(side), 1)[0])


def _point(config: dict[str, Any], rows: list[cases.Row], sizes: Sizes) -> tuple[float, float]:
    both = Both(config)
    inputs = cases.build(config, rows)
    batch = Batch.from_hf(both.ours.config, **inputs)
    run = jax.jit(lambda model, batch: model(batch).logits)
    setting = "grouped_mm + sdpa"
    model = both.theirs(setting)

    def theirs() -> Any:
        with torch.inference_mode():
            return reference.run(model, inputs)

    timed = compare(
        "",
        lambda: jax.block_until_ready(run(both.ours, batch)),
        {setting: theirs},
        pairs=3,
        limit=sizes.limit,
        per=(1, ""),
    )
    return float(np.median(timed.ours)), float(np.median(timed.theirs))


def curves(sizes: Sizes) -> Iterator[Curve]:
    """One curve for each of what may grow, the others held."""
    text = [[cases.Text(256)]]

    def small(layers: int = 1, experts: int = 32) -> dict[str, Any]:
        return quarter(layers, depth=2, experts=experts, vocab_size=4096)

    points: dict[str, dict[int, tuple[dict[str, Any], Any]]] = {
        "tokens": {n: (small(), [[cases.Text(n)]]) for n in (256, 1024, 4096)},
        "pictures of 64 patches": {n: (small(), [[cases.Image(4, 4), cases.Text(1)] * n]) for n in (4, 16, 64)},
        "experts": {n: (small(experts=n), text) for n in (16, 64, 256)},
        "layers": {n: (small(layers=n), text) for n in (1, 2, 4)},
        "rows of the batch": {n: (small(), text * n) for n in (1, 4, 16)},
    }
    for what, of in points.items():
        measured = [_point(config, rows, sizes) for config, rows in of.values()]
        print(f"growth with {what}: {measured}", flush=True)
        yield Curve(what, list(of), *map(list, zip(*measured, strict=True)))
