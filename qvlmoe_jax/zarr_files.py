"""Reading the arrays that our converter writes, through mapped files: no copy but the one that is asked for.

TensorStore reads them too, as it reads every other layout (`orbax_store`), with three copies of the data on the way. This reader
takes plain files of the zarr3 codec `sharding_indexed` without compression only; `convert/zarr_file.py` describes the format.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.fast_copy import aligned_empty, copy_into
from qvlmoe_jax.file_copy import MappedFile
from qvlmoe_jax.local_files import read_json

ABSENT = 2**64 - 1
RAW = [{"name": "bytes", "configuration": {"endian": "little"}}]
INDEX = [*RAW, {"name": "crc32c"}]
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC of a few kilobytes (RFC 3720, B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def in_memory_order(shape: Sequence[int], chunk: Sequence[int]) -> bool:
    """The chunks of a C-contiguous array of `shape`, one after another, are the array's own bytes."""
    if any(size % step for size, step in zip(shape, chunk, strict=True)):
        return False
    cut = next((dim for dim, step in enumerate(chunk) if step != 1), len(chunk))
    return all(step == size for size, step in list(zip(shape, chunk, strict=True))[cut + 1 :])


class ZarrFiles:
    """One array.

    Attributes:
      shape, dtype: of the array.
      file, chunk: shapes of a file's part of it, and of a chunk's.
    """

    def __init__(self, directory: Path, shape: tuple[int, ...], dtype: np.dtype, file: tuple[int, ...], chunk: tuple[int, ...]):
        self.directory, self.shape, self.dtype, self.file, self.chunk = directory, shape, dtype, file, chunk
        self._grid = [size // step for size, step in zip(file, chunk, strict=True)]
        self._last: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None

    @classmethod
    def open(cls, directory: Path) -> ZarrFiles | None:
        """None if this is another kind of array (or none at all): TensorStore knows them, or what is wrong with them."""
        try:
            metadata: Any = read_json(directory / "zarr.json")
            grid, (codec,) = metadata["chunk_grid"], metadata["codecs"]
            file, inner = tuple(grid["configuration"]["chunk_shape"]), codec["configuration"]
            shape, chunk = tuple(metadata["shape"]), tuple(inner["chunk_shape"])
            ours = (
                (metadata["zarr_format"], metadata["node_type"], grid["name"]) == (3, "array", "regular")
                and metadata["chunk_key_encoding"]
                in ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}})
                and codec["name"] == "sharding_indexed"
                and (inner["codecs"], inner["index_codecs"]) == (RAW, INDEX)
                and inner.get("index_location", "end") == "end"
                and all(type(n) is int and n > 0 for n in (*shape, *file, *chunk))
                and len(shape) == len(file) == len(chunk) > 0
                and all(f % c == 0 and c <= s for s, f, c in zip(shape, file, chunk, strict=True))
            )
            return cls(directory, shape, DTYPES[metadata["data_type"]], file, chunk) if ours else None
        except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return None

    def read(self, index: tuple[slice | int, ...] | None, *, copy: bool = True) -> np.ndarray:
        """The part that `index` (slices of step 1, integers) names. With `copy=False` it may be a view of a mapped file.

        Raises:
          ValueError, OSError: a file is missing or damaged.
        """
        index = index or (slice(None),) * len(self.shape)
        bounds = []
        for part, size in zip(index, self.shape, strict=True):
            start, stop, _ = (slice(part, part + 1) if isinstance(part, int) else part).indices(size)
            bounds.append((start, max(start, stop)))
        keep = tuple(0 if isinstance(part, int) else slice(None) for part in index)
        want = [stop - start for start, stop in bounds]
        if not math.prod(want):
            return np.empty(want, self.dtype)[keep]
        cells = [range(start // step, -(-stop // step)) for (start, stop), step in zip(bounds, self.file, strict=True)]
        out = None
        for cell in itertools.product(*cells):
            origin = [i * step for i, step in zip(cell, self.file, strict=True)]
            inside = [
                (max(start - at, 0), min(stop - at, step))
                for (start, stop), at, step in zip(bounds, origin, self.file, strict=True)
            ]
            target = [(a + at - start, b + at - start) for (a, b), at, (start, _) in zip(inside, origin, bounds, strict=True)]
            if out is None and not copy and math.prod(map(len, cells)) == 1:
                view = self._view(cell, inside)
                if view is not None:
                    return view[keep]
            out = aligned_empty(want, self.dtype) if out is None else out
            self._copy(cell, inside, out[tuple(slice(*bound) for bound in target)])
        assert out is not None
        return out[keep]

    def _view(self, cell: tuple[int, ...], inside: list[tuple[int, int]]) -> np.ndarray | None:
        """A file whose bytes are its part of the array as it lies in memory, cut; None where they are not."""
        data, table = self._open(cell)
        size = math.prod(self.chunk) * self.dtype.itemsize
        regular = np.arange(len(table), dtype=np.uint64) * np.uint64(size)
        if not in_memory_order(self.file, self.chunk) or not np.array_equal(table[:, 0], regular):
            return None
        whole = data[: len(table) * size].view(self.dtype).reshape(self.file)
        return whole[tuple(slice(*bound) for bound in inside)]

    def _copy(self, cell: tuple[int, ...], inside: list[tuple[int, int]], target: np.ndarray) -> None:
        view = self._view(cell, inside)
        if view is not None:
            copy_into(target, view)
            return
        data, table = self._open(cell)
        size = math.prod(self.chunk) * self.dtype.itemsize
        for place in itertools.product(
            *(range(a // step, -(-b // step)) for (a, b), step in zip(inside, self.chunk, strict=True))
        ):
            begin = int(table[int(np.ravel_multi_index(place, self._grid)), 0])
            if begin == ABSENT:
                raise ValueError(f"chunk {place} of file {cell} is missing")
            chunk = data[begin : begin + size].view(self.dtype).reshape(self.chunk)
            source, goal = [], []
            for (a, b), i, step in zip(inside, place, self.chunk, strict=True):
                low, high = max(a, i * step), min(b, (i + 1) * step)
                source.append(slice(low - i * step, high - i * step))
                goal.append(slice(low - a, high - a))
            copy_into(target[tuple(goal)], chunk[tuple(source)])

    def _open(self, cell: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """A mapped file's bytes and its checked index `[chunks, (offset, length)]`. The last file stays open."""
        last = self._last  # another thread may replace it
        if last is not None and last[0] == cell:
            return last[1:]
        path = self.directory.joinpath("c", *map(str, cell))
        count = math.prod(self._grid)
        if path.stat().st_size < 16 * count + 4:
            raise ValueError(f"{path.name} of {path.stat().st_size} bytes is cut short")
        data = np.frombuffer(MappedFile.open(path), np.uint8)
        raw = data[-16 * count - 4 :]
        if crc32c(raw[:-4].tobytes()) != int.from_bytes(raw[-4:].tobytes(), "little"):
            raise ValueError("the index of a file has another checksum than its bytes")
        table = np.frombuffer(raw[:-4].tobytes(), "<u8").reshape(count, 2)
        size, room = math.prod(self.chunk) * self.dtype.itemsize, len(data) - 16 * count - 4
        for begin, length in table.tolist():
            if begin != ABSENT and (length != size or begin + length > room):
                raise ValueError("the index of a file points outside of it")
        self._last = (cell, data, table)
        return data, table
