"""A loop over tiles of rows that are sorted by expert: what the CPU's experts' kernels are made of.

R rows, E experts, h rows of a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_MIN_TILE, _MAX_TILE = 8, 256


def tile_heights(num_rows: int, num_experts: int) -> list[int]:
    """Rows that a tile may have, ascending: quarters of an expert's even share and two standard deviations of it, so that under
    even routing most experts fit one tile and few of its rows are wasted."""
    share = max(1, num_rows // num_experts)
    largest = min(_MAX_TILE, share + 2 * math.isqrt(share))
    return sorted({min(num_rows, -(-largest * quarter // (4 * _MIN_TILE)) * _MIN_TILE) for quarter in (1, 2, 3, 4)})


class Tiles(NamedTuple):
    """What is done with each tile of rows, h of them, `own [h,1]` being true of those that are the expert's.

    Attributes:
      weights: `(rest, expert) -> weights`, once per expert.
      work: `(weights, rows of each given matrix, rows of out, own) -> (rows of out, sums)`; what it returns for the rows of
        others is not used, what it adds of them to sums is.
      close: `(rest, expert, sums) -> rest`, with the sums over the expert's tiles.
    """

    weights: Callable[[Any, jax.Array], Any]
    work: Callable[[Any, tuple[jax.Array, ...], jax.Array, jax.Array], tuple[jax.Array, Any]]
    close: Callable[[Any, jax.Array, Any], Any] = lambda rest, *_: rest


def for_each_tile(
    tiles: Tiles, group_sizes_E: jax.Array, given: tuple[jax.Array, ...], out: jax.Array, rest: Any = None
) -> tuple[jax.Array, Any]:
    """Visits every tile of every non-empty group in row order.

    Args:
      given: matrices of R rows. out: one more, whose rows are replaced. rest: what else changes.
    Returns:
      out and rest.
    """
    num_rows, num_experts = out.shape[0], group_sizes_E.shape[0]
    ends = jnp.cumsum(group_sizes_E)
    heights = tile_heights(num_rows, num_experts)
    tallest = heights[-1]
    busy = jnp.nonzero(group_sizes_E > 0, size=num_experts, fill_value=0)[0]

    def of_height(height: int, weights: Any, rows: tuple[jax.Array, ...], own: jax.Array) -> tuple[jax.Array, Any]:
        *given, old = (a[:height] for a in rows)
        new, sums = tiles.work(weights, tuple(given), old, own[:height])
        return jnp.pad(new, ((0, tallest - height), (0, 0))), sums

    def one_expert(i: jax.Array, carry: Any) -> Any:
        out, rest = carry
        expert = busy[i]
        begin, end = ends[expert] - group_sizes_E[expert], ends[expert]
        weights = tiles.weights(rest, expert)
        abstract = jax.eval_shape(tiles.work, weights, tuple(a[:1] for a in given), out[:1], jnp.ones((1, 1), bool))
        has_sums = bool(jax.tree.leaves(abstract[1]))

        def one_tile(t: jax.Array | int, out: jax.Array) -> tuple[jax.Array, Any]:
            first = begin + t * tallest
            start = jnp.minimum(first, num_rows - tallest)  # the last tile may begin among rows already done
            at = start + jnp.arange(tallest)
            own = ((at >= first) & (at < end))[:, None]
            rows = tuple(jax.lax.dynamic_slice(a, (start, 0), (tallest, a.shape[1])) for a in (*given, out))
            enough = jnp.searchsorted(jnp.asarray(heights), jnp.minimum(end - start, tallest))
            # Only tiles go in and out: a conditional copies what it is given to change.
            new, more = jax.lax.switch(enough, [functools.partial(of_height, h) for h in heights], weights, rows, own)
            out = jax.lax.dynamic_update_slice(out, jnp.where(own, new, rows[-1]), (start, 0))
            return out, more

        def one_more(t: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            out, more = one_tile(t, state[0])
            return out, jax.tree.map(jnp.add, state[1], more)

        # Most experts have one tile: where there are sums, no zeroes to add it to.
        begun = one_tile(0, out) if has_sums else (out, None)
        out, sums = jax.lax.fori_loop(int(has_sums), (end - begin + tallest - 1) // tallest, one_more, begun)
        return out, tiles.close(rest, expert, sums)

    return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), one_expert, (out, rest))
