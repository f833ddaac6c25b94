"""How a parameter is cut on disk: into files of some 64 MiB, and inside a file into the chunks that one read fetches.

A mesh reads slices along the dims that the sharding table shards, so chunks are cut along those and no read fetches what another
device needs: each expert apart, the fsdp dim into up to 32 parts. Every boundary of a mesh of up to that many then lies on a
chunk's boundary. A dim that only `tensor` shards stays whole, so that a chunk is one run of the source's bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qvlmoe_jax.sharding_table import axes_of

FILE_BYTES = 64 << 20
"""Two files are in memory while they are written; on object stores and disks alike larger ones gain nothing (platform.md)."""
CHUNK_BYTES = 1 << 19
"""Chunks of large parameters are not cut below this: each costs a request."""
SMALL_CHUNK_BYTES = 1 << 11
"""Nor is anything cut below this."""
SMALL_PARTS, PARTS = 8, 32


@dataclass(frozen=True)
class Chunks:
    """Shapes over the whole parameter: `file` is a multiple of `chunk`."""

    file: tuple[int, ...]
    chunk: tuple[int, ...]


def plan_chunks(shape: Sequence[int], spec: Sequence[object], itemsize: int) -> Chunks:
    """The cut of one parameter.

    Args:
      shape: of the parameter, stacked dims first.
      spec: its row of the sharding table, over the trailing dims.
      itemsize: bytes of a number on disk.
    """
    stacked = len(shape) - len(spec)
    inner = list(shape[stacked:])
    chunk = list(inner)

    def size() -> int:
        return math.prod(chunk) * itemsize

    for dim, entry in enumerate(spec):
        if axes_of(entry) == ("expert",) and size() // inner[dim] >= SMALL_CHUNK_BYTES:
            chunk[dim] = 1
    for dim, entry in enumerate(spec):
        if not any(axis in axes_of(entry) for axis in ("fsdp", "expert")) or chunk[dim] == 1:
            continue
        parts = 1
        while chunk[dim] % 2 == 0 and parts < PARTS:
            if size() // 2 < (SMALL_CHUNK_BYTES if parts < SMALL_PARTS else CHUNK_BYTES):
                break
            chunk[dim] //= 2
            parts *= 2

    # a stack of small tensors is one file; of large ones, each has its own
    whole = math.prod(shape) * itemsize <= FILE_BYTES
    file = list(inner)
    for dim in range(len(file)):
        while math.prod(file) * itemsize > FILE_BYTES and file[dim] > chunk[dim]:
            units = -(-file[dim] // chunk[dim])
            file[dim] = chunk[dim] * -(-units // 2)
    one, lead = (1,) * stacked, tuple(shape[:stacked])
    together = whole and chunk == inner  # every device reads it all: one chunk
    return Chunks((lead if whole else one) + tuple(file), (lead if together else one) + tuple(chunk))


def pieces(shape: Sequence[int], chunks: Chunks) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each file's place in the grid of files, and the slice of the parameter that it holds."""
    counts = [range(-(-size // step)) for size, step in zip(shape, chunks.file, strict=True)]
    for cell in itertools.product(*counts):
        yield (
            cell,
            tuple(slice(i * step, min((i + 1) * step, size)) for i, step, size in zip(cell, chunks.file, shape, strict=True)),
        )
