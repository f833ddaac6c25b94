"""The experts' kernels for inference, on the weights of all layers at once: one layer's are used where they lie.

A scan over layers slices each layer's weights out of the stack, which copies them; for experts that is every expert of the
layer, when a decoding step needs k of them (12 ms a layer against 0.3 at 128 experts of 512 x 192). No gradients here.

R rows, L layers, E experts, D hidden, F expert width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qvlmoe_jax.experts import ragged_experts, run_tiles, zero_past
from qvlmoe_jax.layers import einsum, swiglu


def _flat(gate_up_LED2F: jax.Array, down_LEFD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layers and experts as one dim: which is how they lie in memory."""
    return gate_up_LED2F.reshape(-1, *gate_up_LED2F.shape[2:]), down_LEFD.reshape(-1, *down_LEFD.shape[2:])


def _row_experts(num_rows: int, group_sizes_E: jax.Array) -> jax.Array:
    """The expert of each sorted row, `[R]`; E for rows that belong to nobody."""
    return jnp.sum(jnp.arange(num_rows)[:, None] >= jnp.cumsum(group_sizes_E), axis=1, dtype=jnp.int32)


def looped_rows(
    rows_RD: jax.Array, gate_up_LED2F: jax.Array, down_LEFD: jax.Array, group_sizes_E: jax.Array, layer: jax.Array
) -> jax.Array:
    """One matrix-vector product after another, each straight from its expert's weights: few rows on a CPU."""
    R, D = rows_RD.shape
    E, F = group_sizes_E.shape[0], gate_up_LED2F.shape[-1]
    gate_up, down = _flat(gate_up_LED2F, down_LEFD)
    experts = layer * E + _row_experts(R, group_sizes_E)

    def one_row(r: jax.Array, out: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice(rows_RD, (r, 0), (1, D))
        hidden = einsum("RD,DF->RF", x, gate_up[experts[r]].reshape(D, 2 * F))
        y = einsum("RF,FD->RD", swiglu(hidden[:, :F], hidden[:, F:]), down[experts[r]])
        return jax.lax.dynamic_update_slice(out, y, (r, 0))

    return jax.lax.fori_loop(0, jnp.sum(group_sizes_E), one_row, jnp.zeros_like(rows_RD))


def gathered_rows(
    rows_RD: jax.Array, gate_up_LED2F: jax.Array, down_LEFD: jax.Array, group_sizes_E: jax.Array, layer: jax.Array
) -> jax.Array:
    """A copy of each row's expert, then batched products: few rows on an accelerator, where a loop would wait on itself."""
    E = group_sizes_E.shape[0]
    gate_up, down = _flat(gate_up_LED2F, down_LEFD)
    experts = layer * E + jnp.minimum(_row_experts(len(rows_RD), group_sizes_E), E - 1)
    hidden = einsum("RD,RDCF->RCF", rows_RD, gate_up[experts])
    y = einsum("RF,RFD->RD", swiglu(hidden[:, 0], hidden[:, 1]), down[experts])
    return zero_past(y, group_sizes_E)


def stacked_tiles(
    rows_RD: jax.Array, gate_up_LED2F: jax.Array, down_LEFD: jax.Array, group_sizes_E: jax.Array, layer: jax.Array
) -> jax.Array:
    """`tiled_experts` on layer `layer`: rows one by one while most experts have at most one, else tiles."""
    R, E = rows_RD.shape[0], group_sizes_E.shape[0]
    if R <= E:
        return looped_rows(rows_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer)
    return run_tiles(rows_RD, *_flat(gate_up_LED2F, down_LEFD), group_sizes_E, first_expert=layer * E)


def stacked_ragged(
    rows_RD: jax.Array, gate_up_LED2F: jax.Array, down_LEFD: jax.Array, group_sizes_E: jax.Array, layer: jax.Array
) -> jax.Array:
    """`ragged_experts` on layer `layer`; a copy of the layer is cheaper than one copy per row when rows outnumber experts."""
    if rows_RD.shape[0] <= group_sizes_E.shape[0]:
        return gathered_rows(rows_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer)
    return ragged_experts(rows_RD, gate_up_LED2F[layer], down_LEFD[layer], group_sizes_E)


STACKED_KERNELS = {"tiles": stacked_tiles, "ragged_dot": stacked_ragged}
