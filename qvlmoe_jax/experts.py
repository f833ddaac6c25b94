"""The experts' kernels: rows sorted by expert in, rows out. Dropless and exact, whatever the routing.

R rows, D hidden, L layers, E experts, F expert width. gate_up `[E,D,2,F]` holds gate at 0 and up at 1 of its axis of two, so a
shard of F never splits a gate from its up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qvlmoe_jax.grouped import ragged_product, tokamax_product, zero_past
from qvlmoe_jax.layers import einsum, swiglu
from qvlmoe_jax.tiles import Tiles, for_each_tile


class ExpertStack(NamedTuple):
    """The experts of all layers, `gate_up [L,E,D,2,F]` and `down [L,E,F,D]`, and the one layer that is meant.

    A layer's slice of a stack is a copy of all its experts; on 4 layers of 128 of 512 x 192, that was half of the time of a
    forward pass of 64 tokens on a CPU. Kernels that are given a stack read experts where they lie.
    """

    gate_up: jax.Array
    down: jax.Array
    layer: jax.Array

    def flat(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """gate_up `[L*E,D,2,F]`, down `[L*E,F,D]`, as they lie in memory, and the layer's first expert in them."""
        gate_up, down = (a.reshape(-1, *a.shape[2:]) for a in self[:2])
        return gate_up, down, self.layer * self.gate_up.shape[1]


def grouped_experts(
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    rows_RD: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    stack: ExpertStack | None = None,
) -> jax.Array:
    """Two grouped products: the kernels of TPU and GPU. Same contract as `tiled_experts`, but that weights read in `stack` have
    their gradients there."""
    E, D, _, F = gate_up_ED2F.shape
    if stack is not None and len(rows_RD) <= E:
        return _gathered_experts(rows_RD, group_sizes_E, stack)
    hidden = product(rows_RD, gate_up_ED2F.reshape(E, D, 2 * F), group_sizes_E)
    act = swiglu(hidden[:, :F], hidden[:, F:])
    return zero_past(product(act, down_EFD, group_sizes_E), group_sizes_E)


def _gathered_experts(rows: jax.Array, group_sizes: jax.Array, stack: ExpertStack) -> jax.Array:
    """A copy of each row's expert, then batched products: while rows are few, cheaper than a copy of the layer."""
    gate_up, down, first = stack.flat()
    experts = first + jnp.minimum(row_experts(len(rows), group_sizes), len(group_sizes) - 1)
    hidden = einsum("RD,RDCF->RCF", rows, gate_up[experts])
    y = einsum("RF,RFD->RD", swiglu(hidden[:, 0], hidden[:, 1]), down[experts])
    return zero_past(y, group_sizes)


@jax.custom_vjp
def tiled_experts(
    rows_RD: jax.Array, gate_up_ED2F: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array, stack: ExpertStack | None = None
) -> jax.Array:
    """`down(swiglu(gate, up))` of each row by its own expert, as a loop over tiles of rows: the kernel of CPU.

    Every array is written over what it is made from and nobody needs any more: outputs over rows here, their gradients over
    the outputs', and an expert's gradient over its weights. Zeroes to write into would be a pass over memory of their own.

    Args:
      rows_RD: rows sorted by expert; rows past the sum of the groups belong to nobody.
      group_sizes_E: int32, how many rows each expert owns.
      stack: holds the same weights; the forward pass then reads them there. All gradients go to the layer's own.
    Returns:
      `[R,D]`, zero in the rows that belong to nobody.
    """
    gate_up, down, first = (gate_up_ED2F, down_EFD, 0) if stack is None else stack.flat()
    return run_tiles(rows_RD, gate_up, down, group_sizes_E, first)


def run_tiles(
    rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array, first_expert: jax.Array | int
) -> jax.Array:
    """`tiled_experts` without a gradient; group 0's weights are those at `first_expert`. Rows one by one while most experts have
    at most one, else tiles."""
    if rows.shape[0] <= group_sizes.shape[0]:
        return _row_by_row(rows, gate_up, down, group_sizes, first_expert)
    F = gate_up.shape[-1]

    def weights(_: None, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        return expert_weights(gate_up, down, first_expert + expert)

    def work(weights: Any, _: Any, x: jax.Array, own: jax.Array) -> tuple[jax.Array, None]:
        del own
        hidden = einsum("RD,DF->RF", x, weights[0])
        return einsum("RF,FD->RD", swiglu(hidden[:, :F], hidden[:, F:]), weights[1]), None

    out, _ = for_each_tile(Tiles(weights, work), group_sizes, (), rows)
    return zero_past(out, group_sizes)


def _row_by_row(
    rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array, first_expert: jax.Array | int
) -> jax.Array:
    """One matrix-vector product after another, each straight from its expert's weights, which a tile would copy first."""
    (R, D), F = rows.shape, gate_up.shape[-1]
    experts = first_expert + row_experts(R, group_sizes)

    def one_row(r: jax.Array, out: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice(rows, (r, 0), (1, D))
        hidden = einsum("RD,DF->RF", x, gate_up[experts[r]].reshape(D, 2 * F))
        y = einsum("RF,FD->RD", swiglu(hidden[:, :F], hidden[:, F:]), down[experts[r]])
        return jax.lax.dynamic_update_slice(out, y, (r, 0))

    return jax.lax.fori_loop(0, jnp.sum(group_sizes), one_row, jnp.zeros_like(rows))


def row_experts(num_rows: int, group_sizes_E: jax.Array) -> jax.Array:
    """The expert of each sorted row, `[R]`; E for rows that belong to nobody."""
    return jnp.sum(jnp.arange(num_rows)[:, None] >= jnp.cumsum(group_sizes_E), axis=1, dtype=jnp.int32)


def _tiled_forward(*inputs: Any) -> tuple[jax.Array, Any]:
    return tiled_experts(*inputs), inputs[:4]


def expert_weights(gate_up: jax.Array, down: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One expert's two matrices, `[D,2F]` and `[F,D]`."""
    return gate_up[expert].reshape(gate_up.shape[1], -1), down[expert]


def write_gradients(
    gradients: tuple[jax.Array, jax.Array], expert: Any, sums: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`gradients`, of gate_up and down, with one expert's over what was there; in a stack its index is after the layer's."""
    (d_gate_up, d_down), (dw_in, dw_out) = gradients, sums
    d_gate_up = d_gate_up.at[expert].set(dw_in.reshape(d_gate_up.shape[-3:]).astype(d_gate_up.dtype))
    return d_gate_up, d_down.at[expert].set(dw_out.astype(d_down.dtype))


def gradients_of_tile(weights: Any, given: tuple[jax.Array, ...], dy: jax.Array, own: jax.Array) -> tuple[jax.Array, Any]:
    """`Tiles.work` of a backward pass: the rows' gradient, and the weights' `[D,2F]` and `[F,D]` in float32."""
    (w_in, w_out), (x,) = weights, given
    F = w_out.shape[0]
    dy = jnp.where(own, dy, 0)
    hidden = einsum("RD,DF->RF", x, w_in)
    act, pullback = jax.vjp(lambda h: swiglu(h[:, :F], h[:, F:]), hidden)
    (d_hidden,) = pullback(einsum("RD,FD->RF", dy, w_out))
    dw_in = einsum("RD,RF->DF", x, d_hidden).astype(jnp.float32)
    dw_out = einsum("RF,RD->FD", act, dy).astype(jnp.float32)
    return einsum("RF,DF->RD", d_hidden, w_in), (dw_in, dw_out)


def _tiled_backward(residuals: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    rows, gate_up, down, group_sizes = residuals
    # An expert's gradient goes over its weights: as far as that expert `gradients` are still the weights.
    tiles = Tiles(
        lambda gradients, expert: expert_weights(gradients[0], gradients[1], expert), gradients_of_tile, write_gradients
    )
    d_rows, gradients = for_each_tile(tiles, group_sizes, (rows,), d_out, (gate_up, down))
    busy = group_sizes > 0
    d_gate_up, d_down = (jnp.where(jnp.expand_dims(busy, range(1, d.ndim)), d, 0) for d in gradients)
    return zero_past(d_rows, group_sizes), d_gate_up, d_down, None, None


tiled_experts.defvjp(_tiled_forward, _tiled_backward)

KERNELS = {
    "tiles": tiled_experts,
    "ragged_dot": functools.partial(grouped_experts, ragged_product),
    "tokamax": functools.partial(grouped_experts, tokamax_product),
}
"""`(rows, gate_up, down, group sizes, stack or None) -> rows`."""
