"""One file of a sharded zarr3 array (codec `sharding_indexed`, uncompressed): chunks one after another, then an index of them.

TensorStore can write such files, with three copies of the data on the way; here it goes from the mapped source to the file with
one, the system's own. The format (zarr-specs.readthedocs.io, v3): the index holds offset and length of every chunk in C order as
little-endian uint64, all ones for a chunk past the array's end, and ends with its CRC-32C.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.fast_copy import copy_into
from qvlmoe_jax.file_copy import naming, start_writing_back, write_array, write_text
from qvlmoe_jax.local_files import read_json
from qvlmoe_jax.zarr_files import ABSENT, INDEX, RAW, crc32c, in_memory_order

PART_SUFFIX = ".part"


def write_zarr_metadata(
    directory: Path, shape: Sequence[int], dtype: np.dtype, file_shape: Sequence[int], chunk: Sequence[int]
) -> None:
    """Makes the array's directory with its `zarr.json`, or checks the one that is there against this plan.

    Raises:
      CheckpointError: it describes another array.
      OSError: the system's reason, and the file.
    """
    metadata = {
        "chunk_grid": {"configuration": {"chunk_shape": list(file_shape)}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [
            {
                "configuration": {"chunk_shape": list(chunk), "codecs": RAW, "index_codecs": INDEX},
                "name": "sharding_indexed",
            }
        ],
        "data_type": dtype.name,
        "fill_value": 0.0,
        "node_type": "array",
        "shape": list(shape),
        "zarr_format": 3,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "zarr.json"
    if path.exists():
        if read_json(path) != metadata:
            raise CheckpointError(f"{path}: describes another array than the plan; remove the directory and begin again")
        return
    part = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")  # several workers may get here at once, with the same bytes
    write_text(part, json.dumps(metadata, separators=(",", ":")))
    part.rename(path)


def _chunks(array: np.ndarray, chunk: Sequence[int], grid: Sequence[int]) -> Iterator[np.ndarray | None]:
    """Each chunk of the file's grid as contiguous bytes, filled up with zeros where the array ends inside; None past its end.

    One that had to be put together is overwritten by the next.
    """
    room: np.ndarray | None = None
    for cell in itertools.product(*map(range, grid)):
        part = array[tuple(slice(i * step, (i + 1) * step) for i, step in zip(cell, chunk, strict=True))]
        if not part.size:
            yield None
        elif part.shape == tuple(chunk) and part.flags.c_contiguous:
            yield part
        else:
            room = np.empty(chunk, array.dtype) if room is None else room
            if part.shape != tuple(chunk):
                room[...] = 0
            copy_into(room[tuple(map(slice, part.shape))], part)
            yield room


def write_zarr_file(path: Path, array: np.ndarray, file_shape: Sequence[int], chunk: Sequence[int]) -> None:
    """Writes `array` (less than `file_shape` where the parameter ends) as the file `path`, which appears by one rename.

    Raises:
      OSError: the system's reason, a full disk for one, and the file; what was begun is removed.
    """
    grid = [size // step for size, step in zip(file_shape, chunk, strict=True)]
    plain = array.view(f"u{array.itemsize}")  # numpy moves ml_dtypes' numbers one by one
    index, end = [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with naming(path), part.open("wb", buffering=0) as file:
            if tuple(array.shape) == tuple(file_shape) and array.flags.c_contiguous and in_memory_order(array.shape, chunk):
                size = int(np.prod(chunk, dtype=np.int64)) * array.itemsize
                index = [(i * size, size) for i in range(int(np.prod(grid, dtype=np.int64)))]
                write_array(file.fileno(), plain)
            else:
                for piece in _chunks(plain, chunk, grid):
                    index.append((ABSENT, ABSENT) if piece is None else (end, piece.nbytes))
                    if piece is not None:
                        write_array(file.fileno(), piece)
                        end += piece.nbytes
            table = np.array(index, "<u8").tobytes()
            write_array(file.fileno(), np.frombuffer(table + crc32c(table).to_bytes(4, "little"), np.uint8))
            start_writing_back(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
