"""Attention of new columns over a KV cache, block by block of keys, with a running softmax; inference only.

The loop ends at the last column in use, so cost and traffic follow the conversation's length, not the cache's; and a block of
queries never meets keys that lie behind it.

L layers, B rows, T query columns, S cache columns, N query heads, K kv heads, G = N/K, H head dim, R queries of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qvlmoe_jax.layers import float32_einsum
from qvlmoe_jax.softmax import HIDDEN, running_softmax


def cached_attention(
    q_BTNH: jax.Array,
    k_LBSKH: jax.Array,
    v_LBSKH: jax.Array,
    *,
    layer: jax.Array,
    valid_BS: jax.Array,
    first: jax.Array,
    block: int,
) -> jax.Array:
    """Query column t stands at cache column first + t and sees the valid columns up to its own.

    Args:
      q_BTNH: rotated queries; kv head j serves query heads j*G .. j*G+G-1. Scale is H**-0.5.
      k_LBSKH, v_LBSKH: the caches of all layers, this layer's new columns already in them; read where they lie.
      layer, first: int32 scalars. valid_BS: bool, columns that hold a token.
      block: queries and keys handled at a time.
    Returns:
      `[B,T,N,H]` in the queries' dtype; 0 for a query that sees nothing. Scores, softmax and sums are float32.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_LBSKH.shape[2:4]
    R, width = min(block, T), min(block, S)

    def of_queries(q_BRKGH: jax.Array, row: jax.Array) -> jax.Array:
        """One block of queries, the first of which stands at cache column `row`."""
        rows = row + jnp.arange(R)

        def of_keys(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            largest, total, out = state
            start = jnp.minimum(j * width, S - width)  # the last block may begin inside the one before
            columns = start + jnp.arange(width)
            k, v = (jax.lax.dynamic_slice(a, (layer, 0, start, 0, 0), (1, B, width, K, H))[0] for a in (k_LBSKH, v_LBSKH))
            seen = jax.lax.dynamic_slice(valid_BS, (0, start), (B, width))[:, None] & (columns >= j * width)
            seen = seen & (columns <= rows[:, None])
            scores = float32_einsum("BTKGH,BSKH->BKGTS", q_BRKGH, k)
            scores = jnp.where(seen[:, None, None], scores * H**-0.5, HIDDEN)
            largest, total, weights, shrink = running_softmax(largest, total, scores)
            more = float32_einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v)
            return largest, total, out * shrink[..., None] + more

        empty = jnp.zeros((B, K, N // K, R), jnp.float32)
        state = (jnp.full_like(empty, HIDDEN), empty, jnp.zeros((*empty.shape, H), jnp.float32))
        blocks = jnp.minimum((row + R + width - 1) // width, -(-S // width))
        _, total, out = jax.lax.fori_loop(0, blocks, of_keys, state)
        out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
        return jnp.moveaxis(out.astype(q_BTNH.dtype), 3, 1)

    q = q_BTNH.reshape(B, T, K, N // K, H)
    if T == R:
        return of_queries(q, first).reshape(B, T, N, H)
    count = -(-T // R)
    q = jnp.pad(q, ((0, 0), (0, count * R - T)) + ((0, 0),) * 3).reshape(B, count, R, K, N // K, H)
    out = jax.lax.map(lambda one: of_queries(one[0], first + one[1] * R), (jnp.moveaxis(q, 1, 0), jnp.arange(count)))
    return jnp.moveaxis(out, 0, 1).reshape(B, count * R, N, H)[:, :T]
