"""A training run that holds adapters alone: what it is based on, and its weights as a model directory's, merged when read.

`RUN/lora.json` says which base and how adapted; `RUN/checkpoints/STEP` holds the adapters. Numpy only, no jax.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qvlmoe_jax.checkpoint import RUN_LORA, TrainedWeights, Weights, is_adapter_run, open_weights, step_directory
from qvlmoe_jax.errors import CheckpointError, ConfigError
from qvlmoe_jax.local_files import read_json
from qvlmoe_jax.lora import LoraConfig, adapter_paths, adapter_shapes, as_lora, delta, linear_dims, split_index, target_paths
from qvlmoe_jax.param_tree import check_shapes, nest
from qvlmoe_jax.quantised_base import QuantisedBase

_WHOLE, _ROWS, _COLUMNS = 1 << 18, 4, 1024
FLOAT32 = np.dtype(np.float32)


def _samples(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices of a parameter that tell one model from another: all of a small one, some columns in four places of a large one."""
    if int(np.prod(shape, dtype=np.int64)) <= _WHOLE:
        yield tuple(slice(None) for _ in shape)
        return
    for at in sorted({int(i) for i in np.linspace(0, shape[0] - 1, _ROWS)}):
        yield (slice(at, at + 1), *(slice(0, _ROWS) for _ in shape[1:-1]), slice(0, _COLUMNS))


def base_identity(weights: Weights) -> str:
    """A fingerprint of a model's weights, the same for every form they are stored in. Of large parameters it reads samples, so
    it costs seconds for any model; two models that differ only elsewhere share it."""
    digest = hashlib.sha256()
    for path in sorted(weights.shapes):
        shape = weights.shapes[path]
        digest.update(f"{path} {list(shape)}".encode())
        for index in _samples(shape):
            digest.update(np.ascontiguousarray(weights.read(path, index, FLOAT32)).tobytes())
    return digest.hexdigest()


def write_lora(run: Path, lora: LoraConfig, base: Path, identity: str) -> None:
    """Writes `RUN/lora.json`, whole or not at all."""
    fields = {**vars(lora), "targets": list(lora.targets)}
    text = json.dumps({"base": str(base.resolve()), "base_identity": identity, "lora": fields}, indent=2)
    partial = run / (RUN_LORA + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(run / RUN_LORA)


def read_lora(run: Path) -> tuple[LoraConfig, Path, str]:
    """The adapters' config, the base's directory and its identity.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    file = run / RUN_LORA
    record: Any = read_json(file)
    try:
        return as_lora(record["lora"]), Path(record["base"]), str(record["base_identity"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{file}: not what a LoRA run writes ({error}), expected base, base_identity and lora") from None


class AdaptedWeights(TrainedWeights):
    """The base with a run's adapters merged in: in float32, cast once. The surface of any other directory's weights.

    Attributes:
      lora: how it is adapted. base: the weights it is based on.
      adapter_shapes: adapter path -> shape.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError or ConfigError if a part is missing, or the base is not the one it was trained on."""
        super().__init__(directory)
        run = step_directory(Path(directory)).parent.parent
        self.lora, self.base_path, identity = read_lora(run)
        if not self.base_path.is_dir():
            raise CheckpointError(
                f"{run}: the base of this LoRA run is not at {self.base_path}, expected the model it was trained on; put it back "
                f"there, or change base in {run / RUN_LORA}"
            )
        self.base = open_weights(self.base_path)
        check_shapes(str(self.base_path), self.shapes, self.base.shapes)
        if base_identity(self.base) != identity:
            raise CheckpointError(
                f"{run}: the weights at {self.base_path} are not those this LoRA run was trained on; expected that base there"
            )
        self.adapter_shapes = adapter_shapes(self.config, self.lora)
        self._targets = frozenset(target_paths(self.config, self.lora.targets))
        kind = self.lora.base_quantization
        self._quantised = None if kind is None else QuantisedBase(self.base, kind, FLOAT32)

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """The base's. Raises CheckpointError if the stored adapters are not those that lora.json describes."""
        check_shapes(str(self._arrays.directory), self.adapter_shapes, self._arrays.shapes)
        return self.base.dtypes

    def read(
        self, path: str, index: tuple[slice, ...] | None = None, dtype: np.dtype | None = None, *, copy: bool = True
    ) -> np.ndarray:
        """A slice of one merged parameter, cast to `dtype` (None: the base's)."""
        dtype = np.dtype(dtype or self.dtypes[path])
        dims = linear_dims(path)
        if dims is None or (path not in self._targets and self._quantised is None):
            return self.base.read(path, index, dtype, copy=copy)
        index = tuple(slice(None) for _ in self.shapes[path]) if index is None else index
        if self._quantised is None:
            weight = self.base.read(path, index, FLOAT32, copy=copy)
        else:
            weight = self._quantised.expanded(path, index)
        if path in self._targets:
            a, b = (self._arrays.read(p, i) for p, i in zip(adapter_paths(path), split_index(path, index), strict=True))
            weight = weight + delta(a, b, dims[0], self.lora.scale)
        return weight.astype(dtype, copy=False)

    def adapters(self) -> dict[str, Any]:
        """The adapters alone, nested dicts of numpy arrays as they were trained."""
        assert self.dtypes
        return nest({path: self._arrays.read(path) for path in self.adapter_shapes})


def open_adapted(directory: str | Path) -> AdaptedWeights:
    """The weights of a LoRA run: `RUN` or `RUN/checkpoints/STEP`.

    Raises:
      CheckpointError: it is something else.
    """
    directory = Path(directory)
    if not is_adapter_run(directory):
        raise CheckpointError(f"{directory}: no LoRA run ({RUN_LORA} beside its checkpoints), so it has no adapters to export")
    return AdaptedWeights(directory)
