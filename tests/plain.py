"""Attention as it is defined, with every score at once and derivatives by jax: what the kernels are measured against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def plain_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, segment_ids: jax.Array, causal: bool
) -> jax.Array:
    """As `qvlmoe_jax.attention.attention`, in float32."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BTKH, precision="highest") * H**-0.5
    seen = segment_ids[:, :, None] == segment_ids[:, None, :]
    if causal:
        seen &= jnp.tril(jnp.ones((T, T), bool))
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BTKH, precision="highest").reshape(B, T, N, H)
