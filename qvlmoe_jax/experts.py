"""The experts' kernels: rows sorted by expert in, rows out. Dropless and exact, whatever the routing.

R rows, D hidden, E experts, F expert width. gate_up `[E,D,2,F]` holds gate at 0 and up at 1 of its axis of two, so a shard
of F never splits a gate from its up.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.layers import einsum, swiglu

_MIN_TILE, _MAX_TILE = 8, 256


def ragged_experts(rows_RD: jax.Array, gate_up_ED2F: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Grouped products by `jax.lax.ragged_dot`: the kernel of TPU and GPU. Same contract as `tiled_experts`."""
    E, D, _, F = gate_up_ED2F.shape
    precision = jax.lax.Precision.HIGHEST if rows_RD.dtype == jnp.float32 else None
    hidden = jax.lax.ragged_dot(rows_RD, gate_up_ED2F.reshape(E, D, 2 * F), group_sizes_E, precision=precision)
    act = swiglu(hidden[:, :F], hidden[:, F:])
    return zero_past(jax.lax.ragged_dot(act, down_EFD, group_sizes_E, precision=precision), group_sizes_E)


def zero_past(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeroes the rows that belong to no group (padding tokens, experts of other devices)."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None], rows, 0)


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows per tile: an expert's even share and two standard deviations of it, so that under even routing most experts fit one
    tile and few of its rows are wasted."""
    share = max(1, num_rows // num_experts)
    return min(_MAX_TILE, max(_MIN_TILE, -(-(share + 2 * math.isqrt(share)) // _MIN_TILE) * _MIN_TILE))


def for_each_tile(group_sizes: jax.Array, tile: int, open_expert: Any, close_expert: Any, on_tile: Any, carry: Any) -> Any:
    """Visits every tile of every non-empty group in row order.

    Args:
      open_expert: `(carry, expert) -> local`, once per expert: slices its weights, zeroes its accumulators.
      on_tile: `(carry, local, first_row, rows_left) -> (carry, local)`.
      close_expert: `(carry, local, expert) -> carry`.
    """
    ends = jnp.cumsum(group_sizes)
    num_experts = group_sizes.shape[0]
    busy = jnp.nonzero(group_sizes > 0, size=num_experts, fill_value=0)[0]

    def one_expert(i: jax.Array, carry: Any) -> Any:
        expert = busy[i]
        size, start = group_sizes[expert], ends[expert] - group_sizes[expert]

        def one_tile(t: jax.Array, state: Any) -> Any:
            return on_tile(*state, start + t * tile, size - t * tile)

        carry, local = jax.lax.fori_loop(0, (size + tile - 1) // tile, one_tile, (carry, open_expert(carry, expert)))
        return close_expert(carry, local, expert)

    return jax.lax.fori_loop(0, jnp.sum(group_sizes > 0), one_expert, carry)


def slice_rows(array: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """`count` rows of a matrix from row `first` on."""
    return jax.lax.dynamic_slice(array, (first, 0), (count, array.shape[1]))


def write_rows(array: jax.Array, rows: jax.Array, first: jax.Array) -> jax.Array:
    """The matrix with these rows from row `first` on."""
    return jax.lax.dynamic_update_slice(array, rows, (first, 0))


@jax.custom_vjp
def tiled_experts(rows_RD: jax.Array, gate_up_ED2F: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`down(swiglu(gate, up))` of each row by its own expert, as a loop over tiles of rows: the kernel of the CPU.

    A tile may reach past its expert's last row; what it writes there is overwritten by the tile that owns those rows, since
    tiles are visited in row order. Hence no row is padded, dropped or masked on the way.

    Args:
      rows_RD: rows sorted by expert; rows past the sum of the groups belong to nobody.
      group_sizes_E: int32, how many rows each expert owns.
    Returns:
      `[R,D]`, zero in the rows that belong to nobody.
    """
    return run_tiles(rows_RD, gate_up_ED2F, down_EFD, group_sizes_E)


def run_tiles(
    rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array, first_expert: jax.Array | int = 0
) -> jax.Array:
    """`tiled_experts` without a gradient. Group 0's weights are those at `first_expert`, which lets the stacks of all layers
    be passed whole."""
    R, D = rows.shape
    F = gate_up.shape[-1]
    tile = tile_rows(R, group_sizes.shape[0])
    padded = jnp.pad(rows, ((0, tile), (0, 0)))

    def open_expert(_: jax.Array, expert: jax.Array) -> Any:
        return gate_up[first_expert + expert].reshape(D, 2 * F), down[first_expert + expert]

    def on_tile(out: jax.Array, weights: Any, first: jax.Array, _: jax.Array) -> Any:
        hidden = einsum("RD,DF->RF", slice_rows(padded, first, tile), weights[0])
        y = einsum("RF,FD->RD", swiglu(hidden[:, :F], hidden[:, F:]), weights[1])
        return write_rows(out, y, first), weights

    out = for_each_tile(group_sizes, tile, open_expert, lambda out, *_: out, on_tile, jnp.zeros_like(padded))
    return zero_past(out[:R], group_sizes)


def _tiled_forward(*inputs: jax.Array) -> tuple[jax.Array, Any]:
    return run_tiles(*inputs), inputs


def _tiled_backward(residuals: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    rows, gate_up, down, group_sizes = residuals
    R, D = rows.shape
    E, _, _, F = gate_up.shape
    tile = tile_rows(R, E)
    padded, d_padded = (jnp.pad(a, ((0, tile), (0, 0))) for a in (rows, d_out))

    def open_expert(_: Any, expert: jax.Array) -> Any:
        zeros = jnp.zeros((D, 2 * F), jnp.float32), jnp.zeros((F, D), jnp.float32)
        return gate_up[expert].reshape(D, 2 * F), down[expert], *zeros

    def on_tile(carry: Any, local: Any, first: jax.Array, rows_left: jax.Array) -> Any:
        d_rows, d_gate_up, d_down = carry
        w_in, w_out, dw_in, dw_out = local
        # Rows of the next experts, reached by this tile's end, must not count in this expert's weight gradients.
        own = (jnp.arange(tile) < rows_left)[:, None]
        x = slice_rows(padded, first, tile)
        dy = jnp.where(own, slice_rows(d_padded, first, tile), 0)
        hidden = einsum("RD,DF->RF", x, w_in)
        act, pullback = jax.vjp(lambda h: swiglu(h[:, :F], h[:, F:]), hidden)
        (d_hidden,) = pullback(einsum("RD,FD->RF", dy, w_out))
        dw_in += einsum("RD,RF->DF", x, d_hidden).astype(jnp.float32)
        dw_out += einsum("RF,RD->FD", act, dy).astype(jnp.float32)
        d_rows = write_rows(d_rows, einsum("RF,DF->RD", d_hidden, w_in), first)
        return (d_rows, d_gate_up, d_down), (w_in, w_out, dw_in, dw_out)

    def close_expert(carry: Any, local: Any, expert: jax.Array) -> Any:
        d_rows, d_gate_up, d_down = carry
        _, _, dw_in, dw_out = local
        d_gate_up = d_gate_up.at[expert].set(dw_in.reshape(D, 2, F).astype(d_gate_up.dtype))
        return d_rows, d_gate_up, d_down.at[expert].set(dw_out.astype(d_down.dtype))

    zeros = jnp.zeros_like(padded), jnp.zeros_like(gate_up), jnp.zeros_like(down)
    d_rows, d_gate_up, d_down = for_each_tile(group_sizes, tile, open_expert, close_expert, on_tile, zeros)
    return zero_past(d_rows[:R], group_sizes), d_gate_up, d_down, None


tiled_experts.defvjp(_tiled_forward, _tiled_backward)

KERNELS = {"tiles": tiled_experts, "ragged_dot": ragged_experts}
