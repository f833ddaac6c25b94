"""Parameters straight from a Hugging Face directory, and back to one. Numpy only: arrays of any kind come and go as numpy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import EMBED_TOKENS_KEY, LM_HEAD_KEY, expand, param_shape, rows_by_path
from qvlmoe_jax.hf_match import match
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.safetensors_io import DTYPE_NAMES
from qvlmoe_jax.shards import SafetensorsCheckpoint, local_file, write_shards
from qvlmoe_jax.whole_directory import whole_directory

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
      shapes, dtypes: parameter path -> shape, dtype. A stack of tensors of several dtypes is float32, which holds all of them exactly.
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
                f"{self.files.tensors[LM_HEAD_KEY].file}: {LM_HEAD_KEY!r} differs from {EMBED_TOKENS_KEY!r} although config.json says "
                "tie_word_embeddings = true; expected the same bytes, or tie_word_embeddings = false"
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


def _hf_config(config: Qwen3VLMoeConfig, dtype: np.dtype) -> dict[str, Any]:
    """config.json with the dtype the weights really have (transformers loads in the one it finds there)."""
    out = config.to_hf()
    out.pop("torch_dtype", None)
    out["dtype"] = dtype.name
    for section in (out["text_config"], out["vision_config"]):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = dtype.name
    return out


def save_hf(
    directory: str | Path, config: Qwen3VLMoeConfig, params: Mapping[str, Any], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes config.json and safetensors in the hub's layout; the directory appears whole or not at all.

    Args:
      directory: new, or empty.
      params: the parameter tree (nested dicts of jax or numpy arrays, all of it addressable from this process).
      max_shard_bytes: of one file.
    Raises:
      CheckpointError: the directory is in use, or `params` does not match `config`.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not an empty directory, expected a new one; remove it or choose another")
    flat = flatten(params)
    rows = expand(config)
    check_shapes(str(directory), {path: param_shape(group) for path, group in rows_by_path(rows).items()},
                 {path: tuple(leaf.shape) for path, leaf in flat.items()})
    by_key = {row.key: row for row in rows}
    specs = {row.key: (np.dtype(flat[row.path].dtype), row.hf_shape) for row in rows}
    for key, (dtype, _) in specs.items():
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{directory}: {key!r} is {dtype}, which safetensors cannot hold; cast it first")
    common = Counter(dtype for dtype, _ in specs.values()).most_common(1)[0][0]

    def tensor(key: str) -> np.ndarray:
        row = by_key[key]
        leaf = flat[row.path]
        return row.to_hf(np.asarray(leaf[row.index] if row.index else leaf))

    with whole_directory(directory, suffix=".saving") as staging:
        write_shards(staging, specs, tensor, max_shard_bytes=max_shard_bytes)
        (staging / "config.json").write_text(json.dumps(_hf_config(config, common), indent=2) + "\n", encoding="utf-8")


def check_shapes(where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a parameter tree that is not the config's.

    Raises:
      CheckpointError: names the first parameters that are missing, unknown or of another shape.
    """
    for fault, paths in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if paths:
            raise CheckpointError(f"{where}: {len(paths)} {fault} parameters, first {min(paths)!r}; expected the tree config.json describes")
    for path, shape in expected.items():
        if found[path] != shape:
            raise CheckpointError(f"{where}: parameter {path!r} has shape {list(found[path])}, expected {list(shape)}")
