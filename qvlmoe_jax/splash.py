"""Attention by the TPU's splash kernel (`jax.experimental.pallas.ops.tpu.splash_attention`): no T x S buffer, blocks above the
diagonal skipped.

B batch, T query length, S key length, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.sharding import active_mesh
from qvlmoe_jax.spread import Spread, context_shards

_LANES = 128  # the kernel's head dim and block sizes are multiples of the vector registers' width
_BLOCK = 512


def _block(length: int, most: int) -> int:
    """The largest power of two of lanes, up to `most`, that divides `length`."""
    return next(size for size in (most, most // 2, most // 4, _LANES) if length % size == 0 and size % _LANES == 0)


def padded(x: jax.Array, dim: int, multiple: int) -> jax.Array:
    """`x` with zeros after the end of `dim`, up to a multiple."""
    pad = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, pad if i == dim else 0) for i in range(x.ndim)]) if pad else x


def _kernel(N: int, T: int, S: int, *, causal: bool, shards: int, interpret: bool) -> Any:
    """The kernel object (a pytree whose leaves describe which blocks the mask fills)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv = _block(T // shards, _BLOCK), _block(S, _BLOCK)
    sizes = kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=False,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    mask = masks.CausalMask((T, S), shard_count=shards) if causal else masks.FullMask((T, S))
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=shards, block_sizes=sizes, interpret=interpret
    )


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attention` for queries that start at key column 0. Lengths and head dim are padded to what the kernel takes.

    On a mesh causal queries stay spread over `context`, keys and values are gathered over it; heads are spread over `tensor`.

    Args:
      q_segments `[B,T]`, kv_segments `[B,S]`: 0 = padding.
      interpret: run the kernel's program on any platform, slowly: for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    (_, T, N, H), dtype = q_BTNH.shape, q_BTNH.dtype
    shards = context_shards(causal=causal)
    # The kernel has no scale: it goes into q, in float32, rounded once.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(dtype)
    q, k, v = (padded(a, 3, _LANES) for a in (q_BTNH, k_BSKH, v_BSKH))
    q, q_segments = padded(q, 1, _LANES * shards), padded(q_segments, 1, _LANES * shards)
    k, v, kv_segments = (padded(a, 1, _LANES * shards) for a in (k, v, kv_segments))

    def local(splash: Any, q: jax.Array, k: jax.Array, v: jax.Array, q_seg: jax.Array, kv_seg: jax.Array) -> jax.Array:
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        out = jax.vmap(lambda q, k, v, a, b: splash(q, k, v, segment_ids=kernel.SegmentIds(a, b)))(q, k, v, q_seg, kv_seg)
        return jnp.swapaxes(out, 1, 2)

    spread, mesh = Spread.of(q.shape, k.shape, causal=causal), active_mesh()
    heads = N if spread is None else spread.heads
    splash = _kernel(heads, q.shape[1], k.shape[1], causal=causal, shards=shards, interpret=interpret)
    if spread is None or mesh is None:
        out = local(splash, q, k, v, q_segments, kv_segments)
    else:
        kernel_spec = splash.manual_sharding_spec(NamedSharding(mesh, P(None, spread.q[1])))
        out = spread.run(local, splash, kernel_spec, q, k, v, q_segments, kv_segments)
    return out[:, :T, :, :H]
