"""How attention lies on a mesh: rows over the batch axes, heads over `tensor`; causal queries stay spread over `context` and meet
keys and values gathered over it, while pictures, whose rows know nothing of each other, take `context` as one more batch axis.

B batch, T query length, S key length, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.sharding import BATCH, PICTURES, active_mesh, fit

WHOLE_HEAD = 2**22
"""Most bytes of one head's keys over all columns whose gradient the TPU compiler scatters as it lies (libtpu 0.0.50, v5p: 16,384
columns of 128 in bfloat16; it all-reduces 20,480)."""


def context_shards(*, causal: bool) -> int:
    """Over how many devices of `context` queries are spread, where their length can be divided so."""
    mesh = active_mesh()
    return dict(mesh.shape)["context"] if mesh is not None and causal else 1


@dataclass(frozen=True)
class Spread:
    """The layout of one call.

    Attributes:
      q, kv: specs of `[B,T,N,H]` and `[B,S,K,H]`. heads: query heads of a device. num_heads: N.
    """

    q: P
    kv: P
    heads: int
    num_heads: int

    @classmethod
    def of(cls, q_shape: Sequence[int], kv_shape: Sequence[int], *, causal: bool) -> Spread | None:
        """None without a mesh."""
        mesh = active_mesh()
        if mesh is None:
            return None
        rows, length = (BATCH, "context") if causal else (PICTURES, None)
        q, kv = (fit((rows, length, "tensor", None), shape, mesh) for shape in (q_shape, kv_shape))
        return cls(q, kv, q_shape[2] // (dict(mesh.shape)["tensor"] if q[2] else 1), q_shape[2])

    def run(self, local: Callable[..., jax.Array], state: Any, state_spec: Any, *arrays: jax.Array) -> jax.Array:
        """`local(state, q, k, v, q_segments, kv_segments)` on every device's own part.

        Args:
          state: what else the kernel needs, a pytree with these specs.
        """
        if self.q[2] != self.kv[2]:
            local = functools.partial(_own_kv_heads, local, heads=self.heads, num_heads=self.num_heads)
        if self.kv[1]:
            local = functools.partial(_whole_keys, local)
        segments = P(*self.q[:2]), P(self.kv[0], None)
        return jax.shard_map(
            local, in_specs=(state_spec, self.q, self.kv, self.kv, *segments), out_specs=self.q, check_vma=False
        )(state, *arrays)


def _own_kv_heads(
    local: Any, state: Any, q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array, heads: int, num_heads: int
) -> Any:
    """`local` where query heads are spread over `tensor` and kv heads are not: each query head takes its kv head's copy."""
    own = (jax.lax.axis_index("tensor") * heads + jnp.arange(heads)) // (num_heads // k.shape[2])
    return local(state, q, jnp.take(k, own, axis=2), jnp.take(v, own, axis=2), *segments)


def _whole_keys(local: Any, state: Any, q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
    """`local` with keys and values gathered here, so that their gradients are reduce-scattered."""
    return local(state, q, _whole(k), _whole(v), *segments)


@jax.custom_vjp
def _whole(a: jax.Array) -> jax.Array:
    """`[B,S/n,K,H]` of n devices of `context` -> `[B,S,K,H]`."""
    return jax.lax.all_gather(a, "context", axis=1, tiled=True)


def _scattered(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    """The transpose of `_whole`.

    Long heads are first cut and put in the order of the devices, a copy: kernels keep S inside K, and a scatter along S of heads
    that are too long for the chip's fast memory one by one is all-reduced by the TPU compiler, for twice the bytes.
    """
    B, S, K, H = gradient.shape
    if S * H * gradient.dtype.itemsize <= WHOLE_HEAD:
        return (jax.lax.psum_scatter(gradient, "context", scatter_dimension=1, tiled=True),)
    shards = gradient.reshape(B, jax.lax.axis_size("context"), -1, K, H)
    rows = jnp.transpose(shards, (1, 0, 3, 2, 4)).reshape(-1, H)
    own = jax.lax.psum_scatter(rows, "context", scatter_dimension=0, tiled=True)
    return (jnp.swapaxes(own.reshape(B, K, -1, H), 1, 2),)


_whole.defvjp(lambda a: (_whole(a), None), _scattered)
