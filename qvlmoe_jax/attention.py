"""Exact attention over segments, for the text decoder (causal, grouped heads) and the vision tower (bidirectional).

B batch, T query length, S key length, N query heads, K kv heads, G = N/K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.layers import einsum
from qvlmoe_jax.splash import splash_attention


def _attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments: jax.Array,
    segments: jax.Array,
    first: jax.Array,
    causal: bool,
) -> jax.Array:
    """Softmax attention of one block of queries, the first of which is column `first`; scores and softmax in float32."""
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    scores = scores * q_BTKGH.shape[-1] ** -0.5
    mask = q_segments[:, :, None] == segments[:, None, :]
    if causal:
        rows = first + jnp.arange(q_segments.shape[1])
        mask &= rows[:, None] >= jnp.arange(segments.shape[1])
    # Every query sees itself (padding is segment 0 and sees padding), so no row of the softmax is empty.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype), v_BSKH)


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
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if backend.attention == "splash":
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, q_segments=segment_ids, kv_segments=segment_ids, causal=causal)
    q = q_BTNH.reshape(B, T, K, N // K, H)
    chunk = backend.attention_chunk
    if backend.attention_kernel(T) == "dense" or T <= chunk:
        out = _attend(q, k_BTKH, v_BTKH, segment_ids, segment_ids, jnp.zeros((), jnp.int32), causal)
        return out.reshape(B, T, N, H)

    # Blocks of queries, one at a time; the backward pass recomputes a block's scores instead of keeping all T x S.
    blocks = -(-T // chunk)
    pad = blocks * chunk - T
    q_blocks = jnp.moveaxis(jnp.pad(q, ((0, 0), (0, pad)) + ((0, 0),) * 3).reshape(B, blocks, chunk, K, N // K, H), 1, 0)
    segment_blocks = jnp.moveaxis(jnp.pad(segment_ids, ((0, 0), (0, pad))).reshape(B, blocks, chunk), 1, 0)

    @jax.checkpoint
    def block(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_block, q_segments, index = inputs
        return _attend(q_block, k_BTKH, v_BTKH, q_segments, segment_ids, index * chunk, causal)

    out = jax.lax.map(block, (q_blocks, segment_blocks, jnp.arange(blocks, dtype=jnp.int32)))
    return jnp.moveaxis(out, 0, 1).reshape(B, blocks * chunk, N, H)[:, :T]
