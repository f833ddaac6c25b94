"""The experts with low-rank adapters: each product is a grouped one of its own, and the base's weights have no gradient.

R rows, E experts, D hidden, F expert width, r rank, I and O any input and output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.grouped import ragged_product, tokamax_product, zero_past
from qvlmoe_jax.layers import einsum, swiglu
from qvlmoe_jax.tiles import Tiles, for_each_tile

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _multiply(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, equation: str, width: int) -> jax.Array:
    def work(matrix: jax.Array, given: tuple[jax.Array, ...], *_: jax.Array) -> tuple[jax.Array, None]:
        return einsum(equation, given[0], matrix), None

    out = jnp.zeros((rows.shape[0], width), rows.dtype)
    return for_each_tile(Tiles(lambda _, expert: w[expert], work), group_sizes, (rows,), out)[0]


@jax.custom_vjp
def tiled_product(rows_RI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`ragged_product` as a loop over tiles (see `experts.tiled_experts`): the kernel of the CPU."""
    return _multiply(rows_RI, w_EIO, group_sizes_E, "RI,IO->RO", w_EIO.shape[2])


def _forward(*inputs: jax.Array) -> tuple[jax.Array, Any]:
    return tiled_product(*inputs), inputs


def _backward(residuals: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Two loops, one per gradient: that of a frozen weight is dead code, and goes."""
    rows, w, group_sizes = residuals

    def work(_: None, given: tuple[jax.Array, ...], out: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, dy = given
        return out, einsum("RI,RO->IO", x, jnp.where(own, dy, 0)).astype(jnp.float32)

    def close(d_w: jax.Array, expert: jax.Array, own_d_w: jax.Array) -> jax.Array:
        return d_w.at[expert].set(own_d_w.astype(d_w.dtype))

    nothing = jnp.zeros((rows.shape[0], 0), rows.dtype)
    tiles = Tiles(lambda *_: None, work, close)
    _, d_w = for_each_tile(tiles, group_sizes, (rows, d_out), nothing, jnp.zeros_like(w))
    return _multiply(d_out, w, group_sizes, "RO,IO->RI", w.shape[1]), d_w, None


tiled_product.defvjp(_forward, _backward)

PRODUCTS: dict[str, Product] = {"tiles": tiled_product, "ragged_dot": ragged_product, "tokamax": tokamax_product}


def adapted_experts(
    product: Product,
    rows_RD: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
    adapters: Mapping[str, jax.Array],
    scale: float,
    group_sizes_E: jax.Array,
) -> jax.Array:
    """`down(swiglu(gate_up(row)))` of each row by its own expert, each linear with its adapter if there is one.

    Args:
      adapters: `gate_up_proj_lora_A [E,D,r]`, `gate_up_proj_lora_B [E,r,2,F]`, `down_proj_lora_A [E,F,r]`,
        `down_proj_lora_B [E,r,D]`, or one pair of them.
    """
    F = gate_up_ED2F.shape[-1]

    def linear(rows: jax.Array, weight: jax.Array, name: str) -> jax.Array:
        y = product(rows, weight, group_sizes_E)
        if name + "_lora_A" not in adapters:
            return y
        low = product(rows, adapters[name + "_lora_A"], group_sizes_E)
        b = adapters[name + "_lora_B"]
        return y + product(scale * low, b.reshape(*b.shape[:2], -1), group_sizes_E)

    hidden = linear(rows_RD, gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1), "gate_up_proj")
    act = swiglu(hidden[:, :F], hidden[:, F:])
    return zero_past(linear(act, down_EFD, "down_proj"), group_sizes_E)
