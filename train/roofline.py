"""How long a step takes at best and at worst: compute, memory and interconnect times of one device, and their range.

Assumptions, on purpose few:
- compute: executed FLOPs (the model's, and the forward pass of the layers again under full remat) at the chip's peak.
- HBM: bytes of the state, the weights and the activations, counted by formula (`hbm_bytes`), at the chip's peak.
- ICI: bytes on the wire per device. Fast: every torus side busy at once, in both directions. Slow: one side of the torus at a
  time. A side too short to wrap around counts as one link, since the chips at its ends have no more and all wait for them.
- best step: the three overlap wholly, so the longest binds. Worst step: none overlaps, and ICI is slow: their sum.
Neither knows of kernels that miss the peak, of routing imbalance or of stragglers. What that costs is read off published
runs: the same formula gives them 75 % or so, they measured 26 to 55 %. The calibrated range is the best times exactly that gap.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.topology import CHIPS, Topology


@dataclass(frozen=True)
class Work:
    """What one device does in a step. FLOPs, bytes; `model_flops` are those MFU counts."""

    model_flops: float
    executed_flops: float
    hbm_bytes: float
    wire_bytes: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step.

    Attributes:
      compute, hbm, ici_fast, ici_slow: each term alone. model: the model's FLOPs at the peak. best: all overlapped.
      worst: nothing overlapped.
      binding: the name of the longest term at best.
      mfu_best, mfu_worst: model FLOPs over peak, at those times.
    """

    compute: float
    hbm: float
    ici_fast: float
    ici_slow: float
    model: float

    @property
    def best(self) -> float:
        return max(self.compute, self.hbm, self.ici_fast)

    @property
    def worst(self) -> float:
        return self.compute + self.hbm + self.ici_slow

    @property
    def binding(self) -> str:
        terms = {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici_fast}
        return max(terms, key=lambda name: terms[name])

    @property
    def mfu_best(self) -> float:
        return self.model / self.best

    @property
    def mfu_worst(self) -> float:
        return self.model / self.worst


def estimate(work: Work, topology: Topology) -> Estimate:
    """The roofline of one device of the topology."""
    chip = topology.chip
    flops = chip.tflops * 1e12 / chip.devices
    link = chip.ici_gbps * 1e9 / 2 / (2 * chip.dims) / chip.devices  # one direction
    links = [n for n in topology.links if n] or [1]
    return Estimate(
        compute=work.executed_flops / flops,
        hbm=work.hbm_bytes / (chip.hbm_gbps * 1e9 / chip.devices),
        ici_fast=work.wire_bytes / (link * sum(links)),
        ici_slow=work.wire_bytes / (link * min(links)),
        model=work.model_flops / flops,
    )


@dataclass(frozen=True)
class Published:
    """A measured MoE training run in JAX on TPU (MaxText's published recipes), and what is known of it.

    Attributes:
      active, total: parameters used per token, and all, in billions. tokens: per chip and step; None = not published.
    """

    name: str
    kind: str
    chips: int
    mfu: float
    active: float
    total: float
    tokens: int | None = None


RUNS = (
    Published("Qwen3-235B-A22B, 256 tpu7x", "tpu7x", 256, 0.273, 22.2, 235.0, 32 * 4096),
    Published("DeepSeek-V3, 512 v5p", "v5p", 512, 0.332, 37.0, 671.0),
    Published("DeepSeek-V3, tpu7x", "tpu7x", 256, 0.265, 37.0, 671.0),
    Published("Llama 4 Scout, v5p", "v5p", 256, 0.491, 17.0, 109.0),
    Published("Mixtral 8x7B, v5p", "v5p", 256, 0.537, 12.9, 46.7),
    Published("Mixtral 8x7B, v6e", "v6e", 256, 0.329, 12.9, 46.7),
    Published("Mixtral 8x22B, v6e", "v6e", 256, 0.362, 39.1, 140.6),
)
"""Chips of the rows without a published count are those of the recipe's family; they do not enter the compute term."""


@dataclass(frozen=True)
class Calibration:
    """A published run beside the formula: `formula` = its best MFU, `gap` = measured / formula, `binding` its longest term."""

    run: Published
    formula: float
    gap: float
    binding: str


def calibrate(run: Published) -> Calibration:
    """The same formula for a published run: 6 FLOPs per active parameter and token (attention pairs left out), full remat, and,
    where its batch is known, weights of all parameters gathered twice and scattered once in bf16 over all chips."""
    chip = CHIPS[run.kind]
    tokens = run.tokens or 1
    model = 6 * run.active * 1e9 * tokens
    wire = 0.0 if run.tokens is None else 3 * 2 * run.total * 1e9
    hbm = 0.0 if run.tokens is None else 34 * run.total * 1e9 / run.chips + wire * 2
    topology = Topology(run.kind, (round(run.chips ** (1 / chip.dims)),) * chip.dims)
    # per chip: a chip of two devices is taken whole
    whole = estimate(Work(model / chip.devices, model * 4 / 3 / chip.devices, hbm / chip.devices, wire / chip.devices), topology)
    return Calibration(run, whole.mfu_best, run.mfu / whole.mfu_best, whole.binding)


def gaps(kind: str) -> tuple[float, float]:
    """Smallest and largest measured / formula over the published runs on this kind of chip; over all runs where none is."""
    found = [calibrate(run).gap for run in RUNS if run.kind == kind] or [calibrate(run).gap for run in RUNS]
    return min(found), max(found)
