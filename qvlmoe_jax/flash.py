"""Attention by the GPU kernel that jax carries (`jax.experimental.pallas.ops.gpu.attention`, in Triton): no T x S buffer, blocks
above the diagonal skipped. No GPU has run it for us yet: its program, interpreted on a CPU, gives what dense attention gives.
(Later versions of jax name tokamax as its successor.)

B batch, T length, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qvlmoe_jax.splash import padded
from qvlmoe_jax.spread import Spread, context_shards

_BLOCK, _BLOCK_BACKWARD = 128, 32


def flash_serves(dtype: jnp.dtype, *, causal: bool) -> bool:
    """Whether the kernel can: it rounds float32 products to TF32, and its queries begin where the keys do."""
    return jnp.dtype(dtype).itemsize == 2 and context_shards(causal=causal) == 1


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids: jax.Array,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attention`, where `flash_serves`. On a mesh rows and heads are spread as `Spread` says.

    Args:
      interpret: run the kernel's program on any platform, slowly: for tests.
    """
    from jax.experimental.pallas.ops.gpu import attention as kernel

    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    q, k, v, segments = (padded(a, 1, _BLOCK) for a in (q_BTNH, k_BTKH, v_BTKH, segment_ids))
    small = _BLOCK_BACKWARD
    sizes = kernel.BlockSizes(
        block_q=_BLOCK, block_k=_BLOCK, block_q_dkv=small, block_kv_dkv=small, block_q_dq=small, block_kv_dq=small
    )

    def local(_: None, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, __: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))  # the kernel knows no shared heads
        return kernel.mha(q, k, v, segments, sm_scale=H**-0.5, causal=causal, block_sizes=sizes, interpret=interpret)

    spread = Spread.of(q.shape, k.shape, causal=causal)
    arrays = q, k, v, segments, segments
    out = local(None, *arrays) if spread is None else spread.run(local, None, None, *arrays)
    return out[:, :T]
