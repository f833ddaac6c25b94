"""Attention by the TPU's splash kernel (`jax.experimental.pallas.ops.tpu.splash_attention`): no T x S buffer; blocks above the
diagonal, and of other documents or frames, are skipped.

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


def skipping(splash: Any, q_segments: jax.Array, kv_segments: jax.Array) -> Any:
    """The kernel without the blocks whose queries and keys share no segment in any row of `[B,T]`, `[B,S]`.

    The kernel's own description of blocks, read at run time, says which of them run and which is loaded next; one for all rows of
    a device, or the kernel would run in a loop over them, whose copies take half as much memory again. Blocks are told apart by
    their least and greatest segment: exact where segments are in order, as packing lays them.
    """
    _, rows, columns = splash.fwd_mask_info.block_mask.shape
    (q_low, q_high), (kv_low, kv_high) = _spans(q_segments, rows), _spans(kv_segments, columns)
    share = (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    runs = jnp.any(share, axis=0) & (splash.fwd_mask_info.block_mask[0] > 0)
    # the kernel divides by each query's sum: none may be without a block, not even padding
    runs = runs.at[:, 0].set(runs[:, 0] | ~jnp.any(runs, axis=1))

    def only(info: Any, loaded: jax.Array) -> Any:
        return info._replace(
            block_mask=runs[None].astype(info.block_mask.dtype), data_next=loaded[None].astype(info.data_next.dtype)
        )

    keys, queries = _next_column(runs), _next_column(runs.T).T
    infos = (only(splash.fwd_mask_info, keys), only(splash.dq_mask_info, keys), only(splash.dkv_mask_info, queries))
    return type(splash)(*infos, **splash.kwargs)


def _spans(segments: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The least and greatest segment of each of so many blocks, `[B,blocks]`; of padding alone, a span that meets no other."""
    cut = segments.reshape(segments.shape[0], blocks, -1)
    return jnp.where(cut == 0, jnp.iinfo(jnp.int32).max, cut).min(axis=2), cut.max(axis=2)


def _next_column(runs: jax.Array) -> jax.Array:
    """For each block of a grid, in the order of its rows, the column of the next that runs, itself included; 0 after the last."""
    steps = jnp.arange(runs.size).reshape(runs.shape)
    following = jax.lax.cummin(jnp.where(runs, steps, runs.size).reshape(-1), reverse=True)
    return jnp.where(following < runs.size, following % runs.shape[1], 0).reshape(runs.shape)


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
        own = skipping(splash, q_seg, kv_seg)
        out = jax.vmap(lambda q, k, v, a, b: own(q, k, v, segment_ids=kernel.SegmentIds(a, b)))(q, k, v, q_seg, kv_seg)
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
