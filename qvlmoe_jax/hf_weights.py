"""Parameters straight from a Hugging Face directory, as numpy arrays: any slice of any of them, read when asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.fast_copy import aligned_empty, copy_into
from qvlmoe_jax.fp8 import FP8, dequantise
from qvlmoe_jax.hf import EMBED_TOKENS_KEY, LM_HEAD_KEY, Row, param_shapes, rows_by_path
from qvlmoe_jax.hf_match import match
from qvlmoe_jax.local_files import local_file
from qvlmoe_jax.shards import SafetensorsCheckpoint

COMPARED_BYTES = 1 << 26
FLOAT32 = np.dtype(np.float32)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """In slices: a whole-array comparison would hold a mask as large as the vocabulary table."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    return all(np.array_equal(a[i : i + COMPARED_BYTES], b[i : i + COMPARED_BYTES]) for i in range(0, a.size, COMPARED_BYTES))


class HFWeights:
    """A Hugging Face checkpoint directory laid against the table. Nothing but headers is read until a parameter is.

    Attributes:
      directory, side_directory: where it lies.
      config: from its config.json.
      files: its tensors by the names on disk.
      match: the table's rows for it, the expert layout found, and the scales of float8 tensors.
      shapes, dtypes: parameter path -> shape, dtype. Tensors of several dtypes stack as float32, which holds them all exactly,
        and so do float8 ones, whose values are scaled.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError or ConfigError, naming the file, key or tensor, if the directory is not a whole checkpoint."""
        self.directory = self.side_directory = Path(directory)
        self.files = SafetensorsCheckpoint(self.directory)
        if (self.directory / "config.json").is_symlink():
            local_file(self.directory, "config.json")
        self.config = Qwen3VLMoeConfig.from_json(self.directory)
        self.match = match(self.config, self.files.tensors, str(directory))
        if self.match.tied_lm_head and not same_bytes(self.tensor(LM_HEAD_KEY), self.tensor(EMBED_TOKENS_KEY)):
            raise CheckpointError(
                f"{self.directory}: {LM_HEAD_KEY!r} differs from {EMBED_TOKENS_KEY!r}, "
                "expected the same bytes because config.json says tie_word_embeddings = true"
            )
        self.rows = rows_by_path(self.match.rows)
        self.shapes = param_shapes(self.config)
        self.dtypes: dict[str, np.dtype] = {}
        for path, rows in self.rows.items():
            found = {self.files.tensors[self.match.names[row.key]].dtype for row in rows}
            self.dtypes[path] = found.pop() if len(found) == 1 and FP8 not in found else FLOAT32

    @property
    def quantised(self) -> bool:
        """Some tensors are float8."""
        return bool(self.match.scales)

    def tensor(self, key: str) -> np.ndarray:
        """A read-only view of the tensor that the table calls `key`, as it is on disk."""
        return self.files.array(self.match.names[key])

    def read(
        self, path: str, index: tuple[slice, ...] | None = None, dtype: np.dtype | None = None, *, copy: bool = True
    ) -> np.ndarray:
        """A slice of one parameter, stacked and cast; only the tensors and rows asked for are touched.

        Args:
          path: '/'-joined.
          index: one slice of step 1 per axis of the parameter, as `jax.make_array_from_callback` gives them; None for all of it.
          dtype: of the result; None for the parameter's own.
          copy: False allows a read-only view of the mapped file where the slice is one tensor's and needs no cast.
        """
        shape, dtype = self.shapes[path], dtype or self.dtypes[path]
        bounds = [_bounds(s, size) for s, size in zip(index or (slice(None),) * len(shape), shape, strict=True)]
        out: np.ndarray | None = None
        for row in self.rows[path]:
            place, inner = _intersect(row, bounds)
            if place is None:
                continue
            source = self._part(row, inner)
            whole = [stop - start for start, stop in bounds]
            if not copy and source.dtype == dtype and source.size == np.prod(whole, dtype=np.int64):
                return source.reshape(whole)
            out = aligned_empty(whole, np.dtype(dtype)) if out is None else out
            copy_into(out[place], source)
        return np.empty([stop - start for start, stop in bounds], dtype) if out is None else out

    def _part(self, row: Row, inner: tuple[slice, ...]) -> np.ndarray:
        weight = self.tensor(row.key)
        if weight.dtype == FP8:
            assert self.config.fp8_block
            return dequantise(row, weight, self.files.array(self.match.scales[row.key]), self.config.fp8_block, inner)
        return row.to_param(weight)[inner]


def _bounds(part: slice, size: int) -> tuple[int, int]:
    """Where a slice of step 1 begins and ends in a dim of `size`; an empty one ends where it begins."""
    start, stop, _ = part.indices(size)
    return start, max(start, stop)


def _intersect(row: Row, bounds: list[tuple[int, int]]) -> tuple[tuple[int | slice, ...] | None, tuple[slice, ...]]:
    """Where in the slice `bounds` of the parameter a row's tensor lands (None: nowhere), and which part of the tensor."""
    index = (*row.index, *(slice(None) for _ in range(len(bounds) - len(row.index))))
    place, inner = [], []
    for at, (start, stop) in zip(index, bounds, strict=True):
        if isinstance(at, slice):
            place.append(slice(None))
            inner.append(slice(start, stop))
        elif start <= at < stop:
            place.append(at - start)
        else:
            return None, ()
    return tuple(place), tuple(inner)
