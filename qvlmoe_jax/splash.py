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


def running(splash: Any, q_segments: jax.Array, kv_segments: jax.Array) -> jax.Array:
    """Which blocks of queries and keys share a segment, `[B,n,m]` of rows `[B,T]`, `[B,S]`, and are not hidden by the mask.

    Blocks are told apart by their least and greatest segment: exact where segments are in order, as packing lays them.
    """
    _, n, m = splash.fwd_mask_info.block_mask.shape
    (q_low, q_high), (kv_low, kv_high) = _spans(q_segments, n), _spans(kv_segments, m)
    share = (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    return share & (splash.fwd_mask_info.block_mask[0] > 0)


def only(splash: Any, runs: jax.Array) -> Any:
    """The kernel for rows that are laid end to end, with only those blocks `[B,n,m]` of each row that run.

    The kernel's own description of blocks, read at run time, says which block a step of its grid loads and whether the step
    runs. So a row's grid is as wide as its own keys, and loads blocks that lie in that row.
    """
    B, n, m = runs.shape
    # the kernel divides by each query's sum: none may be without a block, not even padding
    runs = runs.at[:, :, 0].set(runs[:, :, 0] | ~jnp.any(runs, axis=2))
    by_key = jnp.swapaxes(runs, 1, 2)
    number = jnp.int16 if B * max(n, m) < 2**15 else jnp.int32  # the lists lie in the chip's small scalar memory

    def described(info: Any, runs: jax.Array, loaded: jax.Array) -> Any:
        return info._replace(block_mask=runs[None].astype(info.block_mask.dtype), data_next=loaded[None].astype(number))

    of_queries = runs.reshape(B * n, m), _loaded(runs).reshape(B * n, m)
    of_keys = by_key.reshape(B * m, n).T, _loaded(by_key).reshape(B * m, n).T
    infos = (
        described(splash.fwd_mask_info, *of_queries),
        described(splash.dq_mask_info, *of_queries),
        described(splash.dkv_mask_info, *of_keys),
    )
    return type(splash)(*infos, **splash.kwargs)


def _spans(segments: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The least and greatest segment of each of so many blocks, `[B,blocks]`; of padding alone, a span that meets no other."""
    cut = segments.reshape(segments.shape[0], blocks, -1)
    return jnp.where(cut == 0, jnp.iinfo(jnp.int32).max, cut).min(axis=2), cut.max(axis=2)


def _loaded(runs: jax.Array) -> jax.Array:
    """For each step of the grids `[B,n,m]` of all rows, one after another: which of the `B*m` blocks is in memory then.

    That of the next step that runs, itself included; 0 after the last.
    """
    _, n, m = runs.shape
    steps = jnp.arange(runs.size).reshape(runs.shape)
    following = jax.lax.cummin(jnp.where(runs, steps, runs.size).reshape(-1), reverse=True)
    blocks = following // (n * m) * m + following % m
    return jnp.where(following < runs.size, blocks, 0).reshape(runs.shape)


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
        runs = running(splash, q_seg, kv_seg)
        if causal:
            # One list of blocks for all rows: a list for each would make a loop over kernels, whose copies take half as much
            # memory again; and rows end to end make copies of their many heads.
            own = only(splash, jnp.any(runs, axis=0, keepdims=True))
            q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
            out = jax.vmap(lambda q, k, v, a, b: own(q, k, v, segment_ids=kernel.SegmentIds(a, b)))(q, k, v, q_seg, kv_seg)
            return jnp.swapaxes(out, 1, 2)
        # One row may hold a large picture and another small ones, so each row has blocks of its own.
        rows = q.shape
        q, k, v = (jnp.transpose(a, (2, 0, 1, 3)).reshape(a.shape[2], -1, a.shape[3]) for a in (q, k, v))
        out = only(splash, runs)(q, k, v, segment_ids=kernel.SegmentIds(q_seg.reshape(-1), kv_seg.reshape(-1)))
        return jnp.transpose(out.reshape(rows[2], *rows[:2], rows[3]), (1, 2, 0, 3))

    spread, mesh = Spread.of(q.shape, k.shape, causal=causal), active_mesh()
    heads = N if spread is None else spread.heads
    splash = _kernel(heads, q.shape[1], k.shape[1], causal=causal, shards=shards, interpret=interpret)
    if spread is None or mesh is None:
        out = local(splash, q, k, v, q_segments, kv_segments)
    else:
        kernel_spec = splash.manual_sharding_spec(NamedSharding(mesh, P(None, spread.q[1])))
        out = spread.run(local, splash, kernel_spec, q, k, v, q_segments, kv_segments)
    return out[:, :T, :, :H]
