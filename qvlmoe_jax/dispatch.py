"""Tokens copied to their experts' rows, sorted by expert, and their outputs back to the tokens. Dropless.

S tokens, D hidden, E experts, k experts per token, R = S*k rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qvlmoe_jax.layers import float32_einsum


class Order(NamedTuple):
    """How choices are sorted: row r is the flat choice `choices[r]` and flat choice c is row `rows[c]`, both `[R]` int32."""

    choices: jax.Array
    rows: jax.Array


def count_choices(experts_SK: jax.Array, num_experts: int) -> jax.Array:
    """How many of the choices went to each expert, `[E]` int32; ids of nobody are not counted."""
    # summed along the fastest axis: a third of the time of the other way round on a CPU
    return jnp.sum(experts_SK.reshape(-1) == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)


def sort_choices(experts_SK: jax.Array, num_experts: int) -> Order:
    """Stable, by expert; ids of `num_experts` and above come last."""
    flat = jnp.minimum(experts_SK.reshape(-1), num_experts)
    bits = (flat.shape[0] - 1).bit_length()
    if (num_experts + 1) << bits <= 1 << 32:
        # Expert and place in one number, since sorting numbers takes a quarter of the time of sorting pairs.
        places = jnp.arange(flat.shape[0], dtype=jnp.uint32)
        keys = jnp.sort((flat.astype(jnp.uint32) << bits) | places, stable=False)
        choices = (keys & ((1 << bits) - 1)).astype(jnp.int32)
    else:
        choices = jnp.argsort(flat, stable=True)
    return Order(choices, jax.lax.platform_dependent(choices, cpu=_inverse_by_scatter, default=jnp.argsort))


def _inverse_by_scatter(permutation: jax.Array) -> jax.Array:
    """Its inverse; on a CPU in a fiftieth of the time of a sort, on a TPU slower than one."""
    places = jnp.arange(permutation.shape[0], dtype=permutation.dtype)
    return jnp.zeros_like(permutation).at[permutation].set(places, unique_indices=True, mode="promise_in_bounds")


def dispatch(x_SD: jax.Array, experts_SK: jax.Array, num_experts: int) -> tuple[jax.Array, Order, jax.Array]:
    """Copies each token once per choice, sorted by expert.

    Args:
      experts_SK: expert ids; `num_experts` and above mean "nobody" (padding, another device's experts) and sort last.
    Returns:
      rows `[R,D]`, their order, group sizes `[E]` int32.
    """
    order = sort_choices(experts_SK, num_experts)
    return _to_rows(x_SD, order), order, count_choices(experts_SK, num_experts)


@jax.custom_vjp
def combine(rows_RD: jax.Array, order: Order, weights_SK: jax.Array) -> jax.Array:
    """Undoes `dispatch`: `[S,D]`, each token the weighted sum of its k rows, summed in float32."""
    return jax.lax.platform_dependent(rows_RD, order, weights_SK, cpu=_combine_one_by_one, default=_combine_at_once)


def _combine_at_once(rows_RD: jax.Array, order: Order, weights_SK: jax.Array) -> jax.Array:
    chosen = _to_choices(rows_RD, order).reshape(*weights_SK.shape, -1)
    return float32_einsum("SKD,SK->SD", chosen, weights_SK).astype(rows_RD.dtype)


def _combine_one_by_one(rows_RD: jax.Array, order: Order, weights_SK: jax.Array) -> jax.Array:
    """One gather of S rows after another, which a CPU adds up in one pass; as a sum over an axis, `[S,k,D]` would be written to
    memory first, in four to eight times as long. (On a TPU these gathers take more memory than one of all rows: 1.8 GiB a
    device of 30B's step on v6e:8x8.)
    """
    places_SK = order.rows.reshape(weights_SK.shape)
    terms = (rows_RD[places_SK[:, i]].astype(jnp.float32) * weights_SK[:, i, None] for i in range(weights_SK.shape[1]))
    return functools.reduce(jnp.add, terms).astype(rows_RD.dtype)


def _combine_backward(inputs: tuple[jax.Array, Order, jax.Array], dy_SD: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    rows, order, weights = inputs
    _, pullback = jax.vjp(lambda rows, weights: _combine_at_once(rows, order, weights), rows, weights)
    d_rows, d_weights = pullback(dy_SD)
    return d_rows, None, d_weights


combine.defvjp(lambda *inputs: (combine(*inputs), inputs), _combine_backward)


# Left to themselves the pullbacks of both gathers are scatters that add row by row.


@jax.custom_vjp
def _to_rows(x_SD: jax.Array, order: Order) -> jax.Array:
    """Token c // k in row order.rows[c]."""
    tokens = order.choices // (order.choices.shape[0] // x_SD.shape[0])
    # Behind a barrier, or XLA:CPU divides again for every number of a row: 4.5 ms for 0.7 at 4096 rows of 512.
    return x_SD[jax.lax.optimization_barrier(tokens)]


def _to_rows_backward(residuals: tuple[Order, jax.Array], d_rows_RD: jax.Array) -> tuple[jax.Array, None]:
    order, like_SD = residuals
    (R, D), S = d_rows_RD.shape, like_SD.shape[0]

    def gathered(d_rows: jax.Array) -> jax.Array:
        return _combine_one_by_one(d_rows, order, jnp.ones((S, R // S), jnp.float32))

    def scattered(d_rows: jax.Array) -> jax.Array:
        return jnp.zeros((S, D), d_rows.dtype).at[order.choices // (R // S)].add(d_rows)

    # Gathered is quicker on a CPU; on a TPU it is one more array of all rows (2.1 GiB a device of 30B's step on v6e:8x8).
    return jax.lax.platform_dependent(d_rows_RD, cpu=gathered, default=scattered), None


_to_rows.defvjp(lambda x, order: (_to_rows(x, order), (order, x[:, :0])), _to_rows_backward)


@jax.custom_vjp
def _to_choices(rows_RD: jax.Array, order: Order) -> jax.Array:
    """Row order.rows[c] at place c."""
    return rows_RD[order.rows]


_to_choices.defvjp(lambda rows, order: (_to_choices(rows, order), order), lambda order, d: (d[order.choices], None))
