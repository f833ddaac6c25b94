"""TPU topologies that nobody has to own: `v5p:4x4x4` -> devices to compile for, and the facts of each chip.

Peak rates are one chip's, in bf16; where a chip is two devices (v4, tpu7x) the planner divides them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import TrainingError


@dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      tflops: dense bf16 TFLOP/s. hbm_gib: memory. hbm_gbps: its bandwidth, GB/s.
      ici_gbps: of all the chip's links together, both directions summed, GB/s.
      dims: of its torus. devices: how many jax devices one chip is. whole_from: a dim of at least this size wraps around.
    """

    tflops: float
    hbm_gib: float
    hbm_gbps: float
    ici_gbps: float
    dims: int
    devices: int = 1
    whole_from: int = 4


CHIPS = {
    "v4": Chip(275, 32, 1228, 600, 3, devices=2),
    "v5e": Chip(197, 16, 819, 400, 2, whole_from=16),
    "v5p": Chip(459, 95, 2765, 1200, 3),
    "v6e": Chip(918, 32, 1638, 800, 2, whole_from=16),
    "tpu7x": Chip(2307, 192, 7380, 1200, 3, devices=2),
}
"""Published figures (Google Cloud TPU documentation, as platform facts of this project list them)."""


@dataclass(frozen=True)
class Topology:
    """A slice: `kind` of chip and the torus' `shape`."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def links(self) -> tuple[int, ...]:
        """Along each side, the links of the chip that has fewest: two where the side wraps around, else one, at its ends; none
        where the side is one chip. (A side of a 2-D slice wraps by itself, a 3-D slice wraps if it is made of whole cubes.)"""
        whole_from = self.chip.whole_from
        wraps = [(n if self.chip.dims == 2 else min(self.shape)) >= whole_from for n in self.shape]
        return tuple(0 if n == 1 else 2 if whole else 1 for n, whole in zip(self.shape, wraps, strict=True))

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, name: str) -> Topology:
        """
        Raises:
          TrainingError: not kind:AxB[xC] of a known kind.
        """
        match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
        if match and match[1] in CHIPS:
            shape = tuple(map(int, match[2].split("x")))
            if len(shape) == CHIPS[match[1]].dims and min(shape) > 0:
                return cls(match[1], shape)
        example = ", ".join(f"{kind}:{'x'.join(['4'] * chip.dims)}" for kind, chip in CHIPS.items())
        raise TrainingError(f"topology {name!r} is unknown, expected a kind and the sides of its torus, such as {example}")


ENVIRONMENT = {  # libtpu looks for a machine's TPUs and its metadata server unless told that there are none
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a training run or another plan on the same machine
}


def missing() -> str | None:
    """Why nothing can be compiled for TPUs here, or None."""
    if sys.version_info < (3, 12):
        return f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old for the compiler"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed"
    return None


def prepare_environment() -> None:
    """Sets what libtpu reads; call before jax is imported.

    Raises:
      TrainingError: this machine cannot compile for TPUs.
    """
    if reason := missing():
        raise TrainingError(f"cannot plan: {reason}, expected Python 3.12 or later with libtpu; pip install 'jax[tpu]' there")
    os.environ.update(ENVIRONMENT)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu writes its start-up notes to file descriptor 2, past Python."""
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def open_devices(topology: Topology) -> list[Any]:
    """The topology's devices, to build a mesh of and compile for.

    Raises:
      TrainingError: libtpu refuses the shape.
    """
    from jax.experimental import topologies

    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:  # jax raises RuntimeError, JaxRuntimeError or ValueError, by version
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"libtpu refuses topology {topology.name} ({reason}); try other sides") from None
    return list(found.devices)
