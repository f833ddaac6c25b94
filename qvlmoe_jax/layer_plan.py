"""How the decoder's layers are stacked for `lax.scan`, so that program size does not grow with depth.

Layers that share a body are stored stacked in one *slot*; a *run* scans `period` slots together, `repeats` times. A uniform
model is one run of period 1, `decoder_sparse_step=2` is one run of period 2 (each body holds a dense and a MoE layer),
irregular `mlp_only_layers` give several runs. The plan is the one with the fewest slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from qvlmoe_jax.config import LayerKind, Qwen3VLMoeTextConfig


@dataclass(frozen=True)
class Slot:
    """Layers stacked together: `first, first + period, ...`, `repeats` of them, all of one `kind`.

    `name` is the slot's place in the parameter tree under `layers`: empty when it is the only one, else its first layer.
    """

    kind: LayerKind
    first: int
    period: int
    repeats: int
    name: str

    @property
    def layers(self) -> range:
        """The layer numbers held, in stacking order."""
        return range(self.first, self.first + self.period * self.repeats, self.period)


@dataclass(frozen=True)
class Run:
    """Slots scanned together; step i of the scan runs layer i of each slot in turn."""

    slots: tuple[Slot, ...]

    @property
    def first(self) -> int:
        return self.slots[0].first

    @property
    def repeats(self) -> int:
        return self.slots[0].repeats


def _shortest_cover(kinds: Sequence[LayerKind]) -> list[tuple[int, int, int]]:
    """`(first, period, repeats)` runs covering `kinds` with the fewest bodies, then the fewest runs (dynamic program)."""
    count = len(kinds)
    best: list[tuple[int, int, list[tuple[int, int, int]]]] = [(0, 0, [])] + [(count + 1, 0, [])] * count
    for start in range(count):
        bodies, runs, cover = best[start]
        for period in range(1, count - start + 1):
            repeats = 1
            while start + period * repeats <= count:
                end = start + period * repeats
                if kinds[end - period : end] != kinds[start : start + period]:
                    break
                candidate = (bodies + period, runs + 1)
                if candidate < best[end][:2]:
                    best[end] = (*candidate, [*cover, (start, period, repeats)])
                repeats += 1
    return best[count][2]


@functools.lru_cache
def plan_layers(kinds: tuple[LayerKind, ...]) -> tuple[Run, ...]:
    """The runs for a decoder whose layers are of these kinds, in layer order.

    Example: `("dense", "moe") * 24` gives one run of two slots, `layers.0` and `layers.1`, 24 layers each.
    """
    cover = _shortest_cover(kinds)
    single = sum(period for _, period, _ in cover) == 1
    return tuple(
        Run(tuple(Slot(kinds[first + i], first + i, period, repeats, "" if single else str(first + i)) for i in range(period)))
        for first, period, repeats in cover
    )


def slots(config: Qwen3VLMoeTextConfig) -> tuple[Slot, ...]:
    """Every slot of the decoder, in order of its first layer."""
    return tuple(slot for run in plan_layers(config.layer_kinds()) for slot in run.slots)
