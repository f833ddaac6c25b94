"""Patches some at a time on a CPU, so that what lies between two products stays in the caches.

And in the heap: what is larger than 32 MB glibc takes from the system and gives back every time, and fresh pages are dear (one
picture of 4096 patches beside 64 of 64: 127 MB of them for 354, 1270 ms for 1450; benchmarks/profile.md).
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from qvlmoe_jax.sharding import active_mesh

PIECE_BYTES = 1 << 24
"""What a piece's widest array may take."""

_MOST = 64


def in_pieces(f: Callable[[jax.Array], jax.Array], x_RPD: jax.Array, *, width: int) -> jax.Array:
    """`f(x)`, `[R,P,D] -> [R,P,D]`, which treats every patch alike: in equal pieces on a CPU; elsewhere, and on a mesh, as one.

    Args:
      width: numbers of each patch in the widest array that `f` makes. Patches that no count of pieces up to 64 divides stay
        together.
    """
    if active_mesh() is not None or jax.default_backend() != "cpu":
        return f(x_RPD)
    R, P, D = x_RPD.shape
    needed = -(-R * P * width * x_RPD.dtype.itemsize // PIECE_BYTES)
    pieces = next((n for n in range(max(1, needed), _MOST + 1) if R * P % n == 0), 1)
    if pieces == 1:
        return f(x_RPD)
    return jax.lax.map(f, x_RPD.reshape(pieces, 1, -1, D)).reshape(R, P, D)
