"""Parameters straight from a Hugging Face directory, as numpy arrays: any slice of any of them, read when asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import EMBED_TOKENS_KEY, LM_HEAD_KEY, param_shape, rows_by_path
from qvlmoe_jax.hf_match import match
from qvlmoe_jax.shards import SafetensorsCheckpoint, local_file

COMPARED_BYTES = 1 << 26


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """In slices: a whole-array comparison would hold a mask as large as the vocabulary table."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    return all(np.array_equal(a[i : i + COMPARED_BYTES], b[i : i + COMPARED_BYTES]) for i in range(0, a.size, COMPARED_BYTES))


class HFWeights:
    """A Hugging Face checkpoint directory laid against the table. Nothing but headers is read until a parameter is.

    Attributes:
      config: from its config.json.
      files: its tensors by HF name.
      match: the table's rows for it, and the expert layout found.
      shapes, dtypes: parameter path -> shape, dtype. Tensors of several dtypes stack as float32, which holds them all exactly.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError or ConfigError, naming the file, key or tensor, if the directory is not a whole checkpoint."""
        directory = Path(directory)
        self.files = SafetensorsCheckpoint(directory)
        if (directory / "config.json").is_symlink():
            local_file(directory, "config.json")
        self.config = Qwen3VLMoeConfig.from_json(directory)
        self.match = match(self.config, self.files.tensors, str(directory))
        if self.match.tied_lm_head and not _same_bytes(self.files.array(LM_HEAD_KEY), self.files.array(EMBED_TOKENS_KEY)):
            raise CheckpointError(
                f"{self.files.tensors[LM_HEAD_KEY].file}: {LM_HEAD_KEY!r} differs from {EMBED_TOKENS_KEY!r}, "
                "expected the same bytes because config.json says tie_word_embeddings = true"
            )
        self._rows = rows_by_path(self.match.rows)
        self.shapes = {path: param_shape(rows) for path, rows in self._rows.items()}
        self.dtypes: dict[str, np.dtype] = {}
        for path, rows in self._rows.items():
            found = {self.files.tensors[row.key].dtype for row in rows}
            self.dtypes[path] = found.pop() if len(found) == 1 else np.dtype(np.float32)

    def read(self, path: str, index: tuple[slice, ...] | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """A slice of one parameter, stacked and cast; only the tensors and rows asked for are touched.

        Args:
          path: '/'-joined.
          index: one slice of step 1 per axis of the parameter, as `jax.make_array_from_callback` gives them; None for all of it.
          dtype: of the result; None for the parameter's own.
        """
        shape = self.shapes[path]
        bounds = [s.indices(size)[:2] for s, size in zip(index or (slice(None),) * len(shape), shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype or self.dtypes[path])
        for row in self._rows[path]:
            stacked, inner = bounds[: len(row.index)], bounds[len(row.index) :]
            if all(start <= at < stop for at, (start, stop) in zip(row.index, stacked, strict=True)):
                place = tuple(at - start for at, (start, _) in zip(row.index, stacked, strict=True))
                out[place] = row.to_param(self.files.array(row.key))[tuple(slice(*bound) for bound in inner)]
        return out
