"""Rotary embeddings: interleaved M-RoPE for text, two-axis RoPE for vision.

B batch, T length, R vision rows, P patches, H head dim. Frequencies are numpy float32 constants of the trace, never parameters:
casting a model to bf16 cannot touch them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """`1 / theta**(arange(0, dim, 2) / dim)`, float32 `[dim // 2]` (MOE 849-867).

    The exponent, the power and the quotient are each rounded to float32, as torch does it; the power itself is taken in
    float64 first, so the value does not depend on the machine's vector library. (torch's own AVX-512 power is 1 ulp off
    that in about one entry of 64; computing everything in float64 differs in 16 of 64.)
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power


def mrope_axis(mrope_section: tuple[int, ...], half: int) -> np.ndarray:
    """Which position axis (0 T, 1 H, 2 W) drives each of the `half` frequencies: interleaved T H W T H W ... T T.

    H takes `1, 4, ...` below `3 * section[1]`, W takes `2, 5, ...` below `3 * section[2]`; slices clip at `half` silently,
    which HF's own tiny config relies on (MOE 886-895).
    """
    axis = np.zeros(half, np.int32)
    for which in (1, 2):
        axis[which : 3 * mrope_section[which] : 3] = which
    return axis


def text_rotary(
    position_ids: jax.Array, *, head_dim: int, theta: float, mrope_section: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[B,T,H]` for positions `[3,B,T]`: float32 angles, cast to the activations' dtype at the end."""
    axis = mrope_axis(mrope_section, head_dim // 2)
    positions = jnp.moveaxis(position_ids.astype(jnp.float32)[axis], 0, -1)
    angles = positions * inverse_frequencies(head_dim, theta)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def vision_rotary(patch_coords: jax.Array, *, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[R,P,H]`, float32, for patch coordinates `[R,P,2]` (row, column): row angles, column angles, twice over."""
    angles = patch_coords.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim // 2, theta)
    angles = angles.reshape(*patch_coords.shape[:-1], head_dim // 2)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads `[..., T, N, H]` by tables `[..., T, H]` in x's dtype (neox halves: the pairs are i and i + H/2)."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated_half = jnp.concatenate([-second, first], axis=-1)
    return x * cos[..., None, :] + rotated_half * sin[..., None, :]
