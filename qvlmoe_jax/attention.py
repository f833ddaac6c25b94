"""Exact attention over segments, for the text decoder (causal, grouped heads) and the vision tower (bidirectional).

B batch, T query length, S key length, N query heads, K kv heads, G = N/K, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.blockwise import blockwise_attention
from qvlmoe_jax.flash import flash_attention, flash_serves
from qvlmoe_jax.layers import einsum
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
    if backend.attention_kernel(T) == "dense":
        return dense_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids=segment_ids, causal=causal)

    spread = Spread.of(q_BTNH.shape, k_BTKH.shape, causal=causal)

    def local(_: None, q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, kv_segments: jax.Array) -> Any:
        first = jax.lax.axis_index("context") * q.shape[1] if spread and spread.q[1] else 0
        block = backend.attention_block(q.shape[2])
        return blockwise_attention(
            q, k, v, q_segments=q_segments, kv_segments=kv_segments, causal=causal, block=block, first=first
        )

    arrays = q_BTNH, k_BTKH, v_BTKH, segment_ids, segment_ids
    return local(None, *arrays) if spread is None else spread.run(local, None, None, *arrays)


def dense_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, segment_ids: jax.Array, causal: bool
) -> jax.Array:
    """`attention` with all T x T scores at once; scores and softmax in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BTKH, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    if causal:
        mask &= jnp.tril(jnp.ones((T, T), bool))
    # Every query sees itself (padding is segment 0 and sees padding), so no row of the softmax is empty.
    scores = jnp.where(mask[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    out = einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype), v_BTKH)
    return out.reshape(B, T, N, H)
