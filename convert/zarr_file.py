"""One file of a sharded zarr3 array (codec `sharding_indexed`, uncompressed): chunks one after another, then an index of them.

TensorStore can write such files, with three copies of the data on the way; here it goes from the mapped source to the file with
one, the system's own. The format (zarr-specs.readthedocs.io, v3): the index holds offset and length of every chunk in C order as
little-endian uint64, all ones for a chunk past the array's end, and ends with its CRC-32C.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ABSENT = np.uint64(2**64 - 1)
PART_SUFFIX = ".part"


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


def _in_memory_order(array: np.ndarray, chunk: Sequence[int]) -> bool:
    """The chunks, one after another, are the array's own bytes."""
    if not array.flags.c_contiguous or any(size % step for size, step in zip(array.shape, chunk, strict=True)):
        return False
    cut = next((dim for dim, step in enumerate(chunk) if step != 1), len(chunk))
    return all(step == size for size, step in list(zip(array.shape, chunk, strict=True))[cut + 1 :])


def _chunks(array: np.ndarray, chunk: Sequence[int], grid: Sequence[int]) -> Iterator[np.ndarray | None]:
    """Each chunk of the file's grid as contiguous bytes, filled up with zeros where the array ends inside; None past its end."""
    for cell in itertools.product(*map(range, grid)):
        part = array[tuple(slice(i * step, (i + 1) * step) for i, step in zip(cell, chunk, strict=True))]
        if not part.size:
            yield None
        elif part.shape == tuple(chunk):
            yield np.ascontiguousarray(part)
        else:
            whole = np.zeros(chunk, array.dtype)
            whole[tuple(slice(size) for size in part.shape)] = part
            yield whole


def write_zarr_file(path: Path, array: np.ndarray, file_shape: Sequence[int], chunk: Sequence[int]) -> None:
    """Writes `array` (less than `file_shape` where the parameter ends) as the file `path`, which appears by one rename.

    Raises:
      OSError: the system's reason, a full disk for one; what was begun is removed.
    """
    grid = [size // step for size, step in zip(file_shape, chunk, strict=True)]
    plain = array.view(f"u{array.itemsize}")  # numpy moves ml_dtypes' numbers one by one
    index, end = [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb", buffering=0) as file:
            if tuple(array.shape) == tuple(file_shape) and _in_memory_order(array, chunk):
                size = int(np.prod(chunk, dtype=np.int64)) * array.itemsize
                index = [(i * size, size) for i in range(int(np.prod(grid, dtype=np.int64)))]
                _write(file.fileno(), plain)
            else:
                for piece in _chunks(plain, chunk, grid):
                    index.append((ABSENT, ABSENT) if piece is None else (end, piece.nbytes))
                    if piece is not None:
                        _write(file.fileno(), piece)
                        end += piece.nbytes
            table = np.array(index, "<u8").tobytes()
            _write(file.fileno(), np.frombuffer(table + crc32c(table).to_bytes(4, "little"), np.uint8))
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write(descriptor: int, array: np.ndarray) -> None:
    data = array.reshape(-1).view(np.uint8).data
    while data:  # Linux writes at most 2 GiB at once
        data = data[os.write(descriptor, data) :]
