"""Attention with all scores of a row at once, some rows at a time: the kernel of short rows on CPU and GPU.

A chain of product, sum, softmax and product without a choice in it is one program to XLA:CPU, whose scores never leave the cache;
hence the mask is added, and heads stand before columns.

B batch, T query length, N query heads, K kv heads, G = N/K, R = G*T queries of a kv head, S key length, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qvlmoe_jax.layers import float32_einsum
from qvlmoe_jax.softmax import HIDDEN

_SCORES_BYTES = 1 << 24
"""Of the rows that are handled at a time."""


def dense_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    causal: bool,
    first: jax.Array | int = 0,
) -> jax.Array:
    """As `attention.attention`, for queries `[B,T]` that are the keys `[B,S]` from column `first` on.

    Scores, softmax and sums are float32; the backward pass computes the scores again.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    q = jnp.transpose(q_BTNH.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(B, K, -1, H)
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k_BSKH, v_BSKH))
    out: jax.Array = _attend(q, k, v, _Where(q_segments, kv_segments, jnp.full(B, first, jnp.int32)), causal)
    return jnp.transpose(out.reshape(B, K, N // K, T, H), (0, 3, 1, 2, 4)).reshape(B, T, N, H)


class _Where(NamedTuple):
    """What decides who sees whom: segments `[B,T]` and `[B,S]`, and the key column `[B]` of the first query."""

    q_segments: jax.Array
    kv_segments: jax.Array
    first: jax.Array

    def hidden(self, causal: bool) -> jax.Array:
        """Of one row, `[T,S]`, to be added to scores. Every query sees itself (padding is segment 0 and sees padding), so that no
        softmax is empty."""
        seen = self.q_segments[:, None] == self.kv_segments
        if causal:
            T, S = seen.shape
            seen &= (self.first + jnp.arange(T))[:, None] >= jnp.arange(S)
        return jnp.where(seen, 0, HIDDEN).astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, where: _Where, causal: bool) -> jax.Array:
    """`[B,K,R,H]` from q of that shape, k and v `[B,K,S,H]`."""

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, where: _Where) -> jax.Array:
        hidden = where.hidden(causal)
        scores = float32_einsum("KRH,KSH->KRS", q, k) * q.shape[2] ** -0.5
        scores = (scores.reshape(len(q), -1, *hidden.shape) + hidden).reshape(scores.shape)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        out = float32_einsum("KRS,KSH->KRH", weights.astype(v.dtype), v)
        return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)

    return _some_rows_at_a_time(of_row, q, k, v, where)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, where: _Where, causal: bool) -> tuple[jax.Array, tuple[Any, ...]]:
    out: jax.Array = _attend(q, k, v, where, causal)
    return out, (q, k, v, where, out)


def _backward(causal: bool, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    def of_row(
        q: jax.Array, k: jax.Array, v: jax.Array, where: _Where, out: jax.Array, d_out: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (K, R, H), S = q.shape, k.shape[1]
        # Queries along columns, so that no product has to turn its left side, which XLA:CPU does at a crawl.
        scores = float32_einsum("KSH,KRH->KSR", k, q) * H**-0.5
        hidden = where.hidden(causal).T
        scores = (scores.reshape(K, S, -1, hidden.shape[1]) + hidden[:, None]).reshape(K, S, R)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        d_weights = float32_einsum("KSH,KRH->KSR", v, d_out)
        # The softmax's pullback needs sum_s p_s dp_s of each query, which is out . d_out.
        dots = float32_einsum("KRH,KRH->KR", out, d_out)[:, None]
        d_scores = (weights * (d_weights - dots) * H**-0.5).astype(q.dtype)
        d_q = jnp.swapaxes(float32_einsum("KSH,KSR->KHR", k, d_scores), 1, 2)
        d_k = float32_einsum("KSR,KRH->KSH", d_scores, q)
        d_v = float32_einsum("KSR,KRH->KSH", weights.astype(v.dtype), d_out)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    return *_some_rows_at_a_time(of_row, *residuals, d_out), None


_attend.defvjp(_forward, _backward)


def _some_rows_at_a_time(of_row: Callable[..., Any], q: jax.Array, k: jax.Array, *others: Any) -> Any:
    B, K, R, _ = q.shape
    rows = max(1, _SCORES_BYTES // (4 * K * R * k.shape[2]))
    if B <= rows:
        return jax.vmap(of_row)(q, k, *others)
    return jax.lax.map(lambda row: of_row(*row), (q, k, *others), batch_size=rows)
