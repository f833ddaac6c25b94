"""How the columns of attention are cut into blocks, and which blocks meet: what `blockwise` loops over.

B batch, K kv heads, G query heads of each, S key length, H head dim, C columns of a block, n and m blocks of queries and of keys,
R = G*C rows of a block of queries, W keys handled at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qvlmoe_jax.softmax import HIDDEN

ROWS, LEAST_COLUMNS = 1024, 128
"""Rows of a block of queries that are enough, and columns that it has at least."""

PRODUCT = 1 << 26
"""Multiplications of one product: enough for two cores to share it (XLA:CPU cuts a product into pieces of some 256 by 256 and
never shares a batch dim), few enough for its scores to lie in a cache."""


def columns(length: int, most: int, group: int) -> int:
    """C for `length` queries: `most`, halved until all queries of a kv head fit `ROWS`, and no more than even blocks need."""
    while most % 2 == 0 and most > LEAST_COLUMNS and group * most > ROWS:
        most //= 2
    even = math.ceil(length / math.ceil(length / most))
    return min(length, most, -(-even // 32) * 32)


def wide(blocks: int, rows: int, C: int, H: int) -> int:
    """Blocks of keys to take at once, of this many. (Never all: two cores then take up to half as long again, which was measured
    and not understood.)"""
    return max(1, min(blocks // 2, round(PRODUCT / (rows * C * H))))


def cut(x: jax.Array, C: int) -> jax.Array:
    """`[B,L,...] -> [B,blocks,C,...]`, zeros after the end."""
    pad = -x.shape[1] % C
    x = jnp.pad(x, [(0, pad if i == 1 else 0) for i in range(x.ndim)]) if pad else x
    return x.reshape(x.shape[0], -1, C, *x.shape[2:])


class Where(NamedTuple):
    """What decides who sees whom: segments `[B,n,C]` and `[B,m,C]`, the blocks of keys `[B,n]` that each block of queries
    begins and ends with, and the key column of the first query."""

    q_segments: jax.Array
    kv_segments: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array


def spans(q_segments: jax.Array, kv_segments: jax.Array, first: jax.Array, causal: bool) -> Where:
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
    begin, end = jnp.min(jnp.where(meet, blocks, m), axis=2), jnp.max(jnp.where(meet, blocks + 1, 0), axis=2)
    return Where(q_segments, kv_segments, begin, end, first)


class Block(NamedTuple):
    """One block of queries of one kv head: row of the batch, head, number in the row, q `[R,H]`, segments `[C]`, the blocks of
    keys it begins and ends with."""

    row: jax.Array
    head: jax.Array
    number: jax.Array
    q: jax.Array
    segments: jax.Array
    begin: jax.Array
    end: jax.Array

    @classmethod
    def all(cls, q: jax.Array, where: Where) -> Block:
        """Those of q `[B,K,n,R,H]`, one after another along a leading dim of B*K*n."""
        B, K, n = q.shape[:3]
        row, head, number = (a.reshape(-1) for a in jnp.indices((B, K, n), dtype=jnp.int32))
        segments, begin, end = (a[row, number] for a in (where.q_segments, where.begin, where.end))
        return cls(row, head, number, q.reshape(B * K * n, *q.shape[3:]), segments, begin, end)

    def walk(self, step: Callable[[jax.Array, int, Any], Any], state: Any, wide: int) -> Any:
        """`step(first column, W, state) -> state` over its blocks of keys: `wide` blocks at a time, those left one by one."""
        C = len(self.segments)

        def over(begin: jax.Array, steps: jax.Array, blocks: int, state: Any) -> Any:
            return jax.lax.fori_loop(0, steps, lambda i, state: step((begin + i * blocks) * C, blocks * C, state), state)

        count = jnp.maximum(self.end - self.begin, 0)
        if wide == 1:
            return over(self.begin, count, 1, state)
        state = over(self.begin, count // wide, wide, state)
        return over(self.begin + count // wide * wide, count % wide, 1, state)

    def hidden(self, first: jax.Array, W: int, where: Where, causal: bool, *, keys_first: bool = False) -> jax.Array:
        """`[C,W]`, or `[W,C]`, to be added to scores with the W keys from column `first` on: 0 where a query sees a key."""
        flat = where.kv_segments.reshape(len(where.kv_segments), -1)
        segments = jax.lax.dynamic_slice(flat, (self.row, first), (1, W))[0]
        q_axis, k_axis = (0, 1) if keys_first else (1, 0)
        of_q, of_k = jnp.expand_dims(self.segments, q_axis), jnp.expand_dims(segments, k_axis)
        seen = (of_q == of_k) & (of_k > 0)
        if causal:
            C = len(self.segments)
            q_columns, k_columns = where.first + self.number * C + jnp.arange(C), first + jnp.arange(W)
            seen &= jnp.expand_dims(q_columns, q_axis) >= jnp.expand_dims(k_columns, k_axis)
        return jnp.where(seen, 0, HIDDEN).astype(jnp.float32)

    def pick(self, x: jax.Array, first: jax.Array, W: int) -> jax.Array:
        """`[W,H]`: columns `first` to `first + W` of its row and head in x `[B,K,S,H]`."""
        return jax.lax.dynamic_slice(x, (self.row, self.head, first, 0), (1, 1, W, x.shape[3]))[0, 0]

    def add(self, x: jax.Array, more: jax.Array, first: jax.Array) -> jax.Array:
        """x with `more [W,H]` added to these columns."""
        new = self.pick(x, first, len(more)) + more
        return jax.lax.dynamic_update_slice(x, new[None, None], (self.row, self.head, first, 0))
