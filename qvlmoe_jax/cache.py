"""The KV cache: what a conversation has computed so far, in arrays of a fixed length.

L layers, B rows, S columns, K kv heads, H head dim. All rows write at the same column, so one step is one slice; columns that
hold no token (padding, a row that has stopped) are skipped by the attention mask and by the positions.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qvlmoe_jax.config import Qwen3VLMoeConfig, Qwen3VLMoeTextConfig
from qvlmoe_jax.errors import GenerationError
from qvlmoe_jax.sharding import BATCH, constrain


@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    """A pytree of arrays; not frozen, because `generate` leaves the conversation in the cache it was given.

    Attributes:
      k, v: `[L,B,S,K,H]`, rotated keys, and values, in the model's dtype.
      tokens: `[B,S]` int32, the id whose keys and values stand in the column, -1 where there is none.
      next_position: `[B]` int32, the M-RoPE position (the same on the three axes) of the row's next token: HF's
        `cumsum(mask) - 1 + rope_delta`.
      length: int32 scalar, how many columns are in use; the next token is written there.
    """

    k: Any
    v: Any
    tokens: Any
    next_position: Any
    length: Any

    @property
    def capacity(self) -> int:
        """S."""
        return self.k.shape[2]

    def pinned(self) -> KVCache:
        """With its layout over the active mesh stated: a step's output then has the layout of its input, and compiles once."""
        return KVCache(
            k=constrain(self.k, *CACHE_SPEC),
            v=constrain(self.v, *CACHE_SPEC),
            tokens=constrain(self.tokens, BATCH, None),
            next_position=constrain(self.next_position, BATCH),
            length=constrain(self.length),
        )

    def check(self, config: Qwen3VLMoeConfig | Qwen3VLMoeTextConfig, batch_size: int) -> None:
        """Raises GenerationError for a cache of another model, whose layers or heads would be misread, or another batch."""
        rows, text = self.tokens.shape[0], _text(config)
        if rows != batch_size:
            raise GenerationError(
                f"the cache has {rows} rows, the batch {batch_size}; make one with init_cache(config, {batch_size}, ...)"
            )
        (L, _, _, K, H), own = self.k.shape, (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
        if (L, K, H) != own:
            raise GenerationError(
                f"the cache has {L} layers of {K} kv heads of {H}, the model {own[0]} of {own[1]} of {own[2]}; "
                f"make one with init_cache(model.config, {batch_size}, ...)"
            )

    def refill(self, other: KVCache) -> None:
        """Takes over the arrays of `other`."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


def cache_bytes(config: Qwen3VLMoeConfig | Qwen3VLMoeTextConfig, batch_size: int, length: int, dtype: DTypeLike) -> int:
    """Bytes of `k` and `v`: 2 * L * B * S * K * H numbers."""
    text = _text(config)
    numbers = 2 * text.num_hidden_layers * batch_size * length * text.num_key_value_heads * text.head_dim
    return numbers * np.dtype(dtype).itemsize


def init_cache(
    config: Qwen3VLMoeConfig | Qwen3VLMoeTextConfig, batch_size: int, length: int, *, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache, spread over the mesh set by `jax.set_mesh` when there is one: rows like the batch, kv heads over tensor.

    Args:
      length: columns (S): prompt, answer and padding of every turn must fit.
      dtype: the model's.
    Raises:
      GenerationError: a size below 1.
    """
    if batch_size < 1 or length < 1:
        raise GenerationError(f"a KV cache of {batch_size} rows and {length} columns, expected at least one of each")
    return _zeros(_text(config), batch_size, length, np.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(config: Qwen3VLMoeTextConfig, batch_size: int, length: int, dtype: np.dtype) -> KVCache:
    shape = (config.num_hidden_layers, batch_size, length, config.num_key_value_heads, config.head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        tokens=jnp.full((batch_size, length), -1, jnp.int32),
        next_position=jnp.zeros(batch_size, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    ).pinned()


CACHE_SPEC = (BATCH, None, "tensor", None)
"""Mesh axes of `[B,S,K,H]`."""


def _text(config: Qwen3VLMoeConfig | Qwen3VLMoeTextConfig) -> Qwen3VLMoeTextConfig:
    return config.text_config if isinstance(config, Qwen3VLMoeConfig) else config


@functools.partial(jax.jit, static_argnums=1)
def grow(cache: KVCache, length: int) -> KVCache:
    """The same conversation with room for `length` columns."""
    more = length - cache.capacity
    columns = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    return dataclasses.replace(
        cache,
        k=jnp.pad(cache.k, columns),
        v=jnp.pad(cache.v, columns),
        tokens=jnp.pad(cache.tokens, ((0, 0), (0, more)), constant_values=-1),
    ).pinned()
