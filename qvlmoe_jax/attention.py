"""Exact attention over segments, for the text decoder (causal, grouped heads) and the vision tower (bidirectional).

B batch, T query length, S key length, N query heads, K kv heads, G = N/K, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.blockwise import blockwise_attention
from qvlmoe_jax.dense import dense_attention
from qvlmoe_jax.flash import flash_attention, flash_serves
from qvlmoe_jax.splash import splash_attention
from qvlmoe_jax.spread import Spread


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, segment_ids: jax.Array, causal: bool, backend: BackendConfig
) -> jax.Array:
    """Attention within segments: column t sees column s iff they share a segment and, when causal, s <= t.

    Args:
      q_BTNH, k_BTKH, v_BTKH: rotated heads; kv head j serves query heads j*G .. j*G+G-1. Scale is H**-0.5.
      segment_ids: `[B,T]`, 0 for padding.
    Returns:
      `[B,T,N,H]` in the inputs' dtype. Columns of padding hold finite values without meaning.
    """
    T = q_BTNH.shape[1]
    if backend.attention == "splash":
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, q_segments=segment_ids, kv_segments=segment_ids, causal=causal)
    if backend.attention == "flash" and flash_serves(q_BTNH.dtype, causal=causal):
        return flash_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids=segment_ids, causal=causal)
    kernel = dense_attention
    if backend.attention_kernel(T) == "chunked":
        kernel = functools.partial(blockwise_attention, block=backend.attention_chunk)
    spread = Spread.of(q_BTNH.shape, k_BTKH.shape, causal=causal)

    def local(_: None, q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, kv_segments: jax.Array) -> Any:
        first = jax.lax.axis_index("context") * q.shape[1] if spread and spread.q[1] else 0
        return kernel(q, k, v, q_segments=q_segments, kv_segments=kv_segments, causal=causal, first=first)

    arrays = q_BTNH, k_BTKH, v_BTKH, segment_ids, segment_ids
    return local(None, *arrays) if spread is None else spread.run(local, None, None, *arrays)
