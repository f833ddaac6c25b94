"""One safetensors file: a checked header, lazy memory-mapped tensors, and a writer. Numpy alone.

The format (huggingface/safetensors README): 8 bytes little-endian header length N, N bytes of JSON `{name: {dtype, shape,
data_offsets}}`, then the tensors' raw bytes, offsets counted from the end of the header. A file comes from outside, so nothing in
the header is believed before it is checked against the file.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import WRITE_BYTES, naming, start_writing_back, write_array
from qvlmoe_jax.local_files import parse_json

MAX_HEADER_BYTES = 100_000_000
"""The cap of the Rust reader; the 235B's largest header is some 10 kB."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NAMED_DTYPES = {dtype.name: dtype for dtype in (DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"])}
"""What a `config.json` may name as the dtype of its weights."""

TensorSpec = tuple[np.dtype, tuple[int, ...]]
"""dtype and shape of a tensor that is still to be written."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(path: Path, key: str, entry: Any, data_start: int) -> TensorInfo:
    what = f"{path}: tensor {key!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{what} is {str(entry)[:80]}, expected an object with dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(f"{what} has dtype {name!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{what} has shape {shape!r}, expected a list of sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has data_offsets {offsets!r}, expected [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(f"{what} spans {end - begin} bytes, expected {nbytes} for {name} {shape}")
    return TensorInfo(path, dtype, tuple(shape), data_start + begin, nbytes)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name. Reads the header only.

    Raises:
      CheckpointError: the file is not safetensors, is cut short, or its header contradicts itself or the file's size: every byte
        of data must belong to exactly one tensor.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` or download the file")
        length = int.from_bytes(prefix, "little")
        most = max(min(size - 8, MAX_HEADER_BYTES), 0)
        if len(prefix) < 8 or length > most:
            raise CheckpointError(
                f"{path}: header of {length} bytes in a file of {size}, expected at most {most}; "
                "the file is truncated or is not safetensors"
            )
        header = parse_json(file.read(length), f"{path}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is {str(metadata)[:80]}, expected an object of strings")

    data_start = 8 + length
    tensors = {key: _tensor(path, key, entry, data_start) for key, entry in header.items()}
    end, previous = data_start, "the header"
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {key!r} begins at data offset {info.start - data_start} and {fault} {previous}, "
                f"expected offset {end - data_start}"
            )
        end, previous = info.start + info.nbytes, repr(key)
    if end != size:
        raise CheckpointError(
            f"{path}: {size - data_start} bytes of data, expected {end - data_start} by its header; "
            "the file is truncated or damaged, download it again"
        )
    return tensors


def map_tensor(mapped: mmap.mmap, info: TensorInfo) -> np.ndarray:
    """A read-only view of one tensor inside its mapped file."""
    return np.ndarray(info.shape, info.dtype, buffer=mapped, offset=info.start)


def write_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors of one file in the order in which they lie in it."""
    # wide dtypes first keeps every tensor aligned to its item size, as the Rust writer does
    return sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    blocks: Callable[[str], Iterable[np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, holding one block of one tensor in memory at a time.

    Args:
      specs: name -> (dtype, shape) of every tensor.
      blocks: gives each tensor when its turn comes, as one or more arrays whose bytes follow one another.
      metadata: the header's free strings; transformers insists on `format`.
    Raises:
      CheckpointError: a dtype that the format has no name for.
      OSError: the system's reason, and the file.
    """
    names = write_order(specs)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path}: tensor {name!r} is {dtype}, expected one of {', '.join(map(str, DTYPE_NAMES))}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with Path(path).open("wb", buffering=0) as file:
        with naming(Path(path)):
            write_array(file.fileno(), np.frombuffer(len(encoded).to_bytes(8, "little") + encoded, np.uint8))
        for name in names:
            dtype, shape = specs[name]
            written = 0
            for block in blocks(name):
                assert block.dtype == dtype, f"{name}: {block.dtype}, promised {dtype}"
                start = file.tell()
                with naming(Path(path)):  # and not of the file that the next block is read from
                    write_array(file.fileno(), np.ascontiguousarray(block))
                if block.nbytes >= WRITE_BYTES:
                    start_writing_back(file.fileno(), start, block.nbytes)
                written += block.size
            assert written == math.prod(shape), f"{name}: {written} numbers, promised {shape}"
