"""Exact attention over segments, block by block of keys with a running softmax: memory grows with length, work with the block
pairs that share a segment. Forward and backward; the kernel of CPU and GPU (`splash` is the TPU's).

B batch, T query length, S key length, N query heads, K kv heads, G = N/K, H head dim, C columns of a block, n and m blocks of
queries and of keys, R = G*C rows of a block of queries. (Online softmax: Milakov and Gimelshein, arXiv 1805.02867; the backward
pass: Dao et al., arXiv 2205.14135.)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_MASKED = float(jnp.finfo(jnp.float32).min)
_HIGHEST = jax.lax.Precision.HIGHEST


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
      block: C.
    Returns:
      `[B,T,N,H]`, zero at padding. Scores, softmax and sums are float32.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    C = min(block, T)
    q_segments, kv_segments = _cut(q_segments, C), _cut(kv_segments, C)
    first = jnp.asarray(first, jnp.int32)
    spans = _spans(q_segments, kv_segments, first, causal)
    # Heads before columns, so that a block is one product of [R,H] and [C,H] per kv head.
    q = jnp.transpose(_cut(q_BTNH.reshape(B, T, K, N // K, H), C), (0, 1, 3, 4, 2, 5))
    q = q.reshape(B, -1, K, N // K * C, H)
    k, v = (jnp.swapaxes(_cut(a, C), 2, 3) for a in (k_BSKH, v_BSKH))
    out: jax.Array = _attend(q, k, v, _Where(q_segments, kv_segments, *spans, first), causal)
    out = jnp.transpose(out.reshape(B, -1, K, N // K, C, H), (0, 1, 4, 2, 3, 5))
    return out.reshape(B, -1, N, H)[:, :T]


def _cut(x: jax.Array, C: int) -> jax.Array:
    """`[B,L,...] -> [B,blocks,C,...]`, zeros after the end."""
    pad = -x.shape[1] % C
    x = jnp.pad(x, [(0, pad if i == 1 else 0) for i in range(x.ndim)]) if pad else x
    return x.reshape(x.shape[0], -1, C, *x.shape[2:])


class _Where(NamedTuple):
    """What decides who sees whom: segments `[B,n,C]` and `[B,m,C]`, the blocks of keys `[B,n]` that each block of queries
    begins and ends with, and the key column of the first query."""

    q_segments: jax.Array
    kv_segments: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array


def _spans(q_segments: jax.Array, kv_segments: jax.Array, first: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """First and one past the last block of keys that share a segment with each block of queries, as far as the smallest and the
    largest segment of a block tell: exactly, where a row's segments stand in order, as ours do; else too many, never too few."""
    (n, C), m = q_segments.shape[1:], kv_segments.shape[1]

    def reach(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max), axis=2), jnp.max(segments, axis=2)

    (q_low, q_high), (k_low, k_high) = reach(q_segments), reach(kv_segments)
    # A block of padding reaches from the largest integer to 0 and meets nothing.
    meet = (k_low[:, None] <= q_high[..., None]) & (k_high[:, None] >= q_low[..., None])
    if causal:
        last_columns = first + jnp.arange(1, n + 1) * C - 1
        meet &= jnp.arange(m) * C <= last_columns[:, None]
    blocks = jnp.arange(m, dtype=jnp.int32)
    return jnp.min(jnp.where(meet, blocks, m), axis=2), jnp.max(jnp.where(meet, blocks + 1, 0), axis=2)


class _Block(NamedTuple):
    """One block of queries: row of the batch and number in it, q `[K,R,H]`, segments `[C]`, its blocks of keys."""

    row: jax.Array
    number: jax.Array
    q: jax.Array
    segments: jax.Array
    begin: jax.Array
    end: jax.Array


def _blocks(q: jax.Array, where: _Where) -> _Block:
    """All blocks of queries, one after another along a leading dim of B*n."""
    B, n = q.shape[:2]
    number = jnp.arange(B * n, dtype=jnp.int32)
    flat = [a.reshape(B * n, *a.shape[2:]) for a in (q, where.q_segments, where.begin, where.end)]
    return _Block(number // n, number % n, *flat)


def _pick(x: jax.Array, row: jax.Array, j: jax.Array) -> jax.Array:
    """`x[row, j]`."""
    return jax.lax.dynamic_slice(x, (row, j, *(0,) * (x.ndim - 2)), (1, 1, *x.shape[2:]))[0, 0]


def _scores(block: _Block, k_KCH: jax.Array, j: jax.Array, where: _Where, causal: bool) -> tuple[jax.Array, jax.Array]:
    """float32 scores `[K,G,C,C]` of a block of queries and the block of keys number j, and who sees whom `[C,C]`."""
    (K, R, H), C = block.q.shape, k_KCH.shape[1]
    scores = jnp.einsum("KRH,KSH->KRS", block.q, k_KCH, preferred_element_type=jnp.float32, precision=_HIGHEST) * H**-0.5
    segments = _pick(where.kv_segments, block.row, j)
    seen = (block.segments[:, None] == segments) & (segments > 0)
    if causal:
        rows = where.first + block.number * C + jnp.arange(C)
        seen &= rows[:, None] >= j * C + jnp.arange(C)
    return scores.reshape(K, R // C, C, C), seen


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, where: _Where, causal: bool) -> jax.Array:
    """`[B,n,K,R,H]` from q of that shape and k, v `[B,m,K,C,H]`."""
    return _forward(q, k, v, where, causal)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, where: _Where, causal: bool) -> tuple[jax.Array, Any]:
    def of_queries(block: _Block) -> tuple[jax.Array, jax.Array]:
        K, R, H = block.q.shape

        def of_keys(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            largest, total, out = state
            scores, seen = _scores(block, _pick(k, block.row, j), j, where, causal)
            scores = jnp.where(seen, scores, _MASKED)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            # Half of the mask's value: where nothing was seen yet, masked scores still become 0.
            weights = jnp.exp(scores - jnp.maximum(new_largest, _MASKED / 2)[..., None])
            shrink = jnp.exp(largest - new_largest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            weights = weights.astype(v.dtype).reshape(K, R, -1)
            more = jnp.einsum(
                "KRS,KSH->KRH", weights, _pick(v, block.row, j), preferred_element_type=jnp.float32, precision=_HIGHEST
            )
            return new_largest, total, out * shrink.reshape(K, R, 1) + more

        C = len(block.segments)
        empty = jnp.zeros((K, R // C, C), jnp.float32)
        state = jnp.full_like(empty, _MASKED), empty, jnp.zeros((K, R, H), jnp.float32)
        largest, total, out = jax.lax.fori_loop(block.begin, block.end, of_keys, state)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total.reshape(K, R, 1)).astype(q.dtype), largest + jnp.log(total)

    out, log_total = jax.lax.map(of_queries, _blocks(q, where))
    out = out.reshape(q.shape)
    return out, (q, k, v, where, out, log_total)


def _backward(causal: bool, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, where, out, log_total = residuals
    # The softmax's pullback needs sum_s p_s dp_s of each query, which is out . d_out.
    dots = jnp.einsum("BnKRH,BnKRH->BnKR", out, d_out, preferred_element_type=jnp.float32, precision=_HIGHEST)
    flat = [a.reshape(-1, *a.shape[2:]) for a in (d_out, dots)]

    def of_queries(d_kv: tuple[jax.Array, jax.Array], inputs: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        block, d_out, dots, log_total = inputs
        K, R, H = block.q.shape

        def of_keys(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            d_q, d_k, d_v = state
            k_block, v_block = _pick(k, block.row, j), _pick(v, block.row, j)
            scores, seen = _scores(block, k_block, j, where, causal)
            weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0).reshape(K, R, -1)
            d_weights = jnp.einsum("KRH,KSH->KRS", d_out, v_block, preferred_element_type=jnp.float32, precision=_HIGHEST)
            d_scores = (weights * (d_weights - dots[..., None]) * H**-0.5).astype(q.dtype)
            weights = weights.astype(v.dtype)
            more_v = jnp.einsum("KRS,KRH->KSH", weights, d_out, preferred_element_type=jnp.float32, precision=_HIGHEST)
            more_k = jnp.einsum("KRS,KRH->KSH", d_scores, block.q, preferred_element_type=jnp.float32, precision=_HIGHEST)
            more_q = jnp.einsum("KRS,KSH->KRH", d_scores, k_block, preferred_element_type=jnp.float32, precision=_HIGHEST)
            return d_q + more_q, _add(d_k, more_k, block.row, j), _add(d_v, more_v, block.row, j)

        state = jnp.zeros((K, R, H), jnp.float32), *d_kv
        d_q, d_k, d_v = jax.lax.fori_loop(block.begin, block.end, of_keys, state)
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(of_queries, zeros, (_blocks(q, where), *flat, log_total))
    return d_q.reshape(q.shape), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _add(x: jax.Array, more: jax.Array, row: jax.Array, j: jax.Array) -> jax.Array:
    """`x` with `more` added to `x[row, j]`."""
    return jax.lax.dynamic_update_slice(x, (_pick(x, row, j) + more)[None, None], (row, j, *(0,) * more.ndim))


_attend.defvjp(_forward, _backward)
