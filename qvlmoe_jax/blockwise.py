"""Exact attention over segments, block by block of keys with a running softmax: memory grows with length, work with the block
pairs that share a segment. Forward and backward; the kernel of long rows on CPU and GPU (`splash` is the TPU's).

B batch, T query length, S key length, N query heads, K kv heads, G = N/K, H head dim, C columns of a block, n blocks of queries,
R = G*C rows of a block of queries, W keys handled at once. (The backward pass: Dao et al.,
arXiv 2205.14135.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.blocks import Block, Where, columns, cut, spans, wide
from qvlmoe_jax.layers import float32_einsum
from qvlmoe_jax.softmax import HIDDEN, running_softmax


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    causal: bool,
    block: int,
    first: jax.Array | int = 0,
) -> jax.Array:
    """As `attention.attention`, for queries the first of which stands at key column `first`.

    Args:
      q_segments `[B,T]`, kv_segments `[B,S]`: 0 = padding, which sees nothing and is seen by nothing.
      block: most columns of a block (see `blocks.columns`).
    Returns:
      `[B,T,N,H]`, zero at padding. Scores, softmax and sums are float32.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    C = columns(T, block, N // K)
    where = spans(cut(q_segments, C), cut(kv_segments, C), jnp.asarray(first, jnp.int32), causal)
    # Heads before columns, and a kv head at a time, so that a block is one product of [R,H] and [W,H].
    q = jnp.transpose(cut(q_BTNH.reshape(B, T, K, N // K, H), C), (0, 3, 1, 4, 2, 5))
    q = q.reshape(B, K, -1, N // K * C, H)
    k, v = (jnp.swapaxes(cut(a, C).reshape(B, -1, K, H), 1, 2) for a in (k_BSKH, v_BSKH))
    at_once = wide(where.kv_segments.shape[1], q.shape[3], C, H)
    out: jax.Array = _attend(q, k, v, where, causal, at_once)
    out = jnp.transpose(out.reshape(B, K, -1, N // K, C, H), (0, 2, 4, 1, 3, 5))
    return out.reshape(B, -1, N, H)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, where: Where, causal: bool, at_once: int) -> jax.Array:
    """`[B,K,n,R,H]` from q of that shape and k, v `[B,K,S,H]`."""
    return _forward(q, k, v, where, causal, at_once)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, where: Where, causal: bool, at_once: int) -> tuple[jax.Array, Any]:
    def of_queries(block: Block) -> tuple[jax.Array, jax.Array]:
        (R, H), C = block.q.shape, len(block.segments)

        def of_keys(first: jax.Array, W: int, state: Any) -> Any:
            largest, total, out = state
            scores = float32_einsum("RH,SH->RS", block.q, block.pick(k, first, W)) * H**-0.5
            scores = (scores.reshape(-1, C, W) + block.hidden(first, W, where, causal)).reshape(R, W)
            largest, total, weights, shrink = running_softmax(largest, total, scores)
            more = float32_einsum("RS,SH->RH", weights.astype(v.dtype), block.pick(v, first, W))
            return largest, total, out * shrink[:, None] + more

        none = jnp.zeros(R, jnp.float32)
        largest, total, out = block.walk(of_keys, (none + HIDDEN, none, jnp.zeros((R, H), jnp.float32)), at_once)
        saw = total > 0
        out = out / jnp.where(saw, total, 1)[:, None]
        return out.astype(q.dtype), jnp.where(saw, largest + jnp.log(total), 0)

    out, log_total = jax.lax.map(of_queries, Block.all(q, where))
    out = out.reshape(q.shape)
    return out, (q, k, v, where, out, log_total)


def _backward(causal: bool, at_once: int, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, where, out, log_total = residuals
    # The softmax's pullback needs sum_s p_s dp_s of each query, which is out . d_out. (As a sum XLA:CPU takes ten times as long.)
    dots = float32_einsum("...H,...H->...", out, d_out)
    flat = [a.reshape(-1, *a.shape[3:]) for a in (d_out, dots)]

    def of_queries(d_kv: tuple[jax.Array, jax.Array], inputs: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        block, d_out, dots, log_total = inputs
        (R, H), C = block.q.shape, len(block.segments)

        def of_keys(first: jax.Array, W: int, state: Any) -> Any:
            d_q, d_k, d_v = state
            k_block, v_block = (block.pick(a, first, W) for a in (k, v))
            # Queries along columns, so that no product has to turn its left side, which XLA:CPU does at a crawl; and three axes
            # until the exponential, since its loop is slow where it has to find a query's column by division.
            scores = (float32_einsum("SH,RH->SR", k_block, block.q) * H**-0.5).reshape(W, -1, C)
            hidden = block.hidden(first, W, where, causal, keys_first=True)
            weights = jnp.exp(scores + hidden[:, None] - log_total.reshape(-1, C)).reshape(W, R)
            d_weights = float32_einsum("SH,RH->SR", v_block, d_out)
            d_scores = (weights * (d_weights - dots) * H**-0.5).astype(q.dtype)
            more_v = float32_einsum("SR,RH->SH", weights.astype(v.dtype), d_out)
            more_k = float32_einsum("SR,RH->SH", d_scores, block.q)
            more_q = float32_einsum("SH,SR->HR", k_block, d_scores)
            return d_q + more_q, block.add(d_k, more_k, first), block.add(d_v, more_v, first)

        d_q, d_k, d_v = block.walk(of_keys, (jnp.zeros((H, R), jnp.float32), *d_kv), at_once)
        return (d_k, d_v), d_q.T.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(of_queries, zeros, (Block.all(q, where), *flat, log_total))
    return d_q.reshape(q.shape), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
