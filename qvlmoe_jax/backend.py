"""Which kernels run: chosen once, apart from the model's config, since they change speed and memory but not the answer."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal

from qvlmoe_jax.errors import ConfigError

log = logging.getLogger("qvlmoe_jax")

DENSE_LENGTH = 256
"""Positions up to which all scores at once are quicker than blocks, where `attention` is `auto`."""

SCORES_BYTES = 1 << 22
"""Of one block of all heads in float32, where queries meet a cache: what a core's cache holds."""

_CHOICES = {
    "attention": ("auto", "dense", "chunked", "splash", "flash"),
    "experts": ("auto", "tiles", "ragged_dot", "tokamax"),
    "dispatch": ("allgather", "all_to_all"),
    "remat": ("none", "full", "dots"),
    "router_dtype": ("model", "float32"),
}


@dataclass(frozen=True)
class BackendConfig:
    """Kernel choices.

    Attributes:
      attention: `dense` holds all T x S scores of some rows; `chunked` holds one block of queries' and keys' scores at a time, so
        memory grows linearly with length, and skips blocks that share no segment; `splash` is the TPU's kernel, which skips
        them too; `flash` is the GPU's (not yet run on one; float32 and context parallelism fall back to chunked); `auto` takes
        splash on TPU, elsewhere chunked above 256 positions, dense below.
      attention_chunk: most queries, and keys, per block of the chunked kernel (see `blocks.columns`).
      experts: `tiles` loops over tiles of rows sorted by expert; `ragged_dot` is `jax.lax.ragged_dot`, a kernel on TPU and a
        dense product over all experts elsewhere (CPU: 5.7 s against 0.1 s at 512 tokens; jaxlib 0.9 and 0.10 on GPU: all rows
        once more per expert in memory); `tokamax` is that library's kernels for GPUs (not yet run on one); `auto` takes
        ragged_dot on TPU, tokamax on GPU where it is installed, else tiles.
      dispatch: how tokens reach experts on other devices; `allgather` gathers tokens over the expert axis, `all_to_all` sends
        each row to its expert's device and back (the cheaper one above some 8 expert shards). The same on one device.
      remat: what the backward pass recomputes: nothing, each layer whole (`full`), or all but matrix products (`dots`).
      router_dtype: precision of the router's logits; `model` is HF's (the softmax is float32 either way).
      fake_balanced_gate: for benchmarks only: tokens go to experts in turn, whatever the router says.
    Raises:
      ConfigError: a value outside the choices, named.
    """

    attention: Literal["auto", "dense", "chunked", "splash", "flash"] = "auto"
    attention_chunk: int = 512
    experts: Literal["auto", "tiles", "ragged_dot", "tokamax"] = "auto"
    dispatch: Literal["allgather", "all_to_all"] = "allgather"
    remat: Literal["none", "full", "dots"] = "none"
    router_dtype: Literal["model", "float32"] = "model"
    fake_balanced_gate: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"BackendConfig.{name} = {value!r} is not supported, expected one of {', '.join(choices)}")
        if self.attention_chunk < 1:
            raise ConfigError(f"BackendConfig.attention_chunk = {self.attention_chunk}, expected a positive number of columns")

    def resolve(self, platform: str) -> BackendConfig:
        """The same choices with `auto` settled for `platform` (`cpu`, `gpu`, `tpu`), and logged.

        `attention="auto"` stays where there is no splash kernel: it depends on each call's length.
        """
        changes: dict[str, Any] = {}
        if self.experts == "auto":
            tokamax = platform == "gpu" and importlib.util.find_spec("tokamax") is not None
            changes["experts"] = "ragged_dot" if platform == "tpu" else "tokamax" if tokamax else "tiles"
        if self.attention == "auto" and platform == "tpu":
            changes["attention"] = "splash"
        for what, kernel in changes.items():
            log.info("%s kernel: %s (auto on %s)", what, kernel, platform)
        return dataclasses.replace(self, **changes)

    def attention_kernel(self, length: int) -> Literal["dense", "chunked"]:
        """The kernel for `length` queries where splash and flash do not serve."""
        if self.attention in ("dense", "chunked"):
            return self.attention
        kernel = "chunked" if length > DENSE_LENGTH else "dense"
        log.info("attention kernel: %s (auto, %d queries)", kernel, length)
        return kernel

    def attention_block(self, num_heads: int) -> int:
        """Queries, and keys, that meet at a time over a cache: `attention_chunk`, halved until the scores of all heads take at
        most `SCORES_BYTES`."""
        block = self.attention_chunk
        while block % 2 == 0 and block > 128 and 4 * num_heads * block**2 > SCORES_BYTES:
            block //= 2
        return block
