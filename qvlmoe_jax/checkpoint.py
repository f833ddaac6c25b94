"""Opening a model directory, Hugging Face's or a converted one, as jax arrays of any dtype and sharding; saving in HF's form.

A converted directory holds `conversion.json` (where it came from) and `checkpoint/` (Orbax, keys of the parameter tree). A
Hugging Face directory holds `config.json` and safetensors. A training run holds `hf/` and `checkpoints/STEP/`. All three are read
in place, slice by slice, through one surface: `shapes`, `dtypes`, `read(path, index, dtype)`.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.conversion_record import read_record
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import write_text
from qvlmoe_jax.generation_config import FILE as GENERATION_FILE
from qvlmoe_jax.hf import expand, param_shapes
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.local_files import check_tree
from qvlmoe_jax.lora import is_adapter
from qvlmoe_jax.orbax_store import OrbaxArrays
from qvlmoe_jax.param_tree import check_shapes, flatten, nest
from qvlmoe_jax.safetensors_io import DTYPE_NAMES, NAMED_DTYPES
from qvlmoe_jax.shards import split_shards, write_shards
from qvlmoe_jax.whole_directory import whole_directory

if TYPE_CHECKING:
    import jax

log = logging.getLogger("qvlmoe_jax")

CONVERSION_FILE = "conversion.json"
CHECKPOINT_DIR = "checkpoint"
ARRAYS_DIR = "state"
"""Orbax's name for the tree that `ocp.save` writes, inside the checkpoint."""
RUN_HF, RUN_CHECKPOINTS, RUN_LORA = "hf", "checkpoints", "lora.json"


class ParamStore:
    """Parameters in an Orbax checkpoint, read slice by slice. `HFWeights` has the same surface.

    Attributes:
      directory: what the user named.
      side_directory: where config, tokenizer and processor files lie.
      config: of the model.
      shapes, dtypes: parameter path -> shape, dtype on disk.
    """

    def __init__(self, directory: Path, config: Qwen3VLMoeConfig, arrays: OrbaxArrays):
        self.directory, self.side_directory, self.config = directory, directory, config
        self.shapes = param_shapes(config)
        self._arrays = arrays

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Raises CheckpointError if the stored tree is not the one config.json describes."""
        check_shapes(str(self._arrays.directory), self.shapes, self._arrays.shapes)
        return {path: self._arrays.dtypes[path] for path in self.shapes}

    def read(
        self, path: str, index: tuple[slice, ...] | None = None, dtype: np.dtype | None = None, *, copy: bool = True
    ) -> np.ndarray:
        """A slice of one parameter, cast to `dtype` (None: as it is stored). Only the chunks it touches are read.

        Raises:
          CheckpointError: the data is missing or damaged.
        """
        array = self._arrays.read(path, index, copy=copy)
        return array if dtype is None else array.astype(dtype, copy=False)


def _largest_file(config: Qwen3VLMoeConfig) -> int:
    """Bytes of every parameter with its gradient and moments, in float32, and some more for a small model's side files."""
    return 16 * sum(map(math.prod, param_shapes(config).values())) + (1 << 27)


class ConvertedWeights(ParamStore):
    """A converted directory.

    Attributes:
      conversion: the parsed conversion.json.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError or ConfigError if a part is missing or was written by another version of the table."""
        directory = Path(directory)
        file = directory / CONVERSION_FILE
        checkpoint = directory / CHECKPOINT_DIR
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint}: not found, expected the Orbax checkpoint beside {CONVERSION_FILE}")
        config = Qwen3VLMoeConfig.from_json(directory)
        check_tree(directory, _largest_file(config))
        self.conversion = read_record(file)
        super().__init__(directory, config, OrbaxArrays(checkpoint / ARRAYS_DIR))


class TrainedWeights(ParamStore):
    """The parameters of a training run: `RUN` (its newest step) or `RUN/checkpoints/STEP`; config and side files are in `RUN/hf`.

    Attributes:
      step: the number of the step.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError or ConfigError if a part is missing."""
        directory = Path(directory)
        step = step_directory(directory)
        side = step.parent.parent / RUN_HF
        config = Qwen3VLMoeConfig.from_json(side)
        check_tree(step, _largest_file(config))
        super().__init__(directory, config, OrbaxArrays(step / ARRAYS_DIR, prefix=("params",)))
        self.side_directory, self.step = side, int(step.name)
        router = OrbaxArrays(step / ARRAYS_DIR, prefix=("router",))
        if "bias" in router.names:
            log.warning("%s", left_out_router_bias(step, router.read("bias")))


def left_out_router_bias(where: Path, bias_LE: np.ndarray) -> str:
    """The line that says what becomes of a run's router bias where only parameters are taken or written."""
    return (
        f"{where}: the router bias of the run (up to {np.abs(bias_LE).max():.2g} per expert) is left out, because Hugging Face's "
        "architecture has none; some tokens will choose other experts than in training, so check the quality before use"
    )


def newest_step(run: Path) -> Path:
    """`RUN/checkpoints/STEP` with the highest number.

    Raises:
      CheckpointError: there is none.
    """
    steps = [path for path in (run / RUN_CHECKPOINTS).iterdir() if path.name.isdecimal() and path.is_dir()]
    if not steps:
        raise CheckpointError(f"{run / RUN_CHECKPOINTS}: no finished step, expected directories named by their number")
    return max(steps, key=lambda path: int(path.name))


def step_directory(directory: Path) -> Path:
    """The step that a training checkpoint names: a RUN's newest, or the STEP itself.

    Raises:
      CheckpointError: a RUN without a finished step.
    """
    return newest_step(directory) if (directory / RUN_CHECKPOINTS).is_dir() else directory


def is_training_checkpoint(directory: Path) -> bool:
    """`directory` is a RUN or one of its STEPs."""
    is_step = directory.name.isdecimal() and directory.parent.name == RUN_CHECKPOINTS
    return is_step or ((directory / RUN_CHECKPOINTS).is_dir() and (directory / RUN_HF).is_dir())


def is_adapter_run(directory: Path) -> bool:
    """`directory` is a RUN, or one of its STEPs, that holds adapters alone (see `adapter_run`)."""
    return is_training_checkpoint(directory) and (step_directory(directory).parent.parent / RUN_LORA).is_file()


Weights = HFWeights | ConvertedWeights | TrainedWeights


def open_weights(directory: str | Path) -> Weights:
    """Recognises and checks a model directory. Imports no jax and reads no weights.

    Raises:
      CheckpointError: it is none of the three kinds, or not a whole one.
      ConfigError: its config.json is missing or refused.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: not a directory, expected a Hugging Face checkpoint (config.json and safetensors), a converted one "
            f"({CONVERSION_FILE} and {CHECKPOINT_DIR}/) or a training run ({RUN_HF}/ and {RUN_CHECKPOINTS}/)"
        )
    if (directory / CONVERSION_FILE).exists():
        return ConvertedWeights(directory)
    if is_adapter_run(directory):
        from qvlmoe_jax.adapter_run import AdaptedWeights

        return AdaptedWeights(directory)
    return TrainedWeights(directory) if is_training_checkpoint(directory) else HFWeights(directory)


def stated_dtypes(config: Mapping[str, Any]) -> list[str]:
    """What a `config.json` object names as its weights' dtype, the most telling first: itself, then its text_config."""
    sections = (config, config.get("text_config", {}))
    return [str(section[key]) for section in sections for key in ("dtype", "torch_dtype") if section.get(key)]


def own_dtype(weights: Weights) -> np.dtype:
    """The dtype of a model as its files have it: theirs, or, where they hold several (norms in float32, float8 beside bfloat16),
    the one that config.json names, else that of most parameters. The computation needs one; `transformers` loads in one too.
    """
    (common, _), *others = Counter(weights.dtypes.values()).most_common()
    named = [NAMED_DTYPES[name] for name in stated_dtypes(weights.config.to_hf()) if name in NAMED_DTYPES]
    return named[0] if others and named else common


def load_params(weights: Weights, *, dtype: DTypeLike | None = None, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """A model directory's parameters: nested dicts of jax arrays, sharded by the one table when there is a mesh.

    Args:
      weights: from `open_weights`.
      dtype: of every parameter; None keeps each one's own.
      mesh: None leaves the arrays on the default device.
    Raises:
      CheckpointError: the stored tree is not the config's, or the data cannot be read.
    """
    import jax

    from qvlmoe_jax.sharding import tree_shardings

    stored = weights.dtypes  # checks the tree
    dtypes = stored if dtype is None else dict.fromkeys(weights.shapes, np.dtype(dtype))
    target = nest({path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in weights.shapes.items()})
    if mesh is not None:
        target = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), target, tree_shardings(target, mesh))
    return load_tree(weights, target)


def load_tree(weights: Weights, target: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the whole parameter tree as `target` asks. Each process reads only the slices its devices hold.

    Args:
      target: nested dicts of `jax.ShapeDtypeStruct`, with or without a sharding; the values are cast to its dtypes.
    Returns:
      the same tree of jax arrays.
    Raises:
      CheckpointError: `target` is not the tree of the directory's config, or the data cannot be read.
    """
    import jax

    def load(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.sharding is None:
            return jax.device_put(weights.read(path, dtype=leaf.dtype))  # unlike asarray, on a CPU takes the memory as it is
        return load_shards(lambda index: weights.read(path, index, leaf.dtype), leaf.shape, leaf.dtype, leaf.sharding)

    flat = flatten(target)
    check_shapes("the target", weights.shapes, {path: tuple(leaf.shape) for path, leaf in flat.items()})
    assert weights.dtypes  # checks the stored tree against the config
    return nest({path: load(path, leaf) for path, leaf in flat.items()})


def load_shards(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    """One array on this process's devices: each shard is read once, whichever devices hold it, and leaves the host at once.

    (`jax.make_array_from_callback` asks again for every replica, and holds the shards of all local devices in host memory.)
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    holders: dict[str, tuple[Any, list[Any]]] = {}  # by slice: the slice, the devices
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(str(index), (index, []))[1].append(device)
    shards = []
    for index, devices in holders.values():
        piece = read(index)
        shards += [jax.device_put(piece, SingleDeviceSharding(device, memory_kind=sharding.memory_kind)) for device in devices]
        del piece
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)


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


def _writes(params: Mapping[str, Any]) -> bool:
    """Whether this process writes: it has everything, or is the first of those that share it."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in flatten(params).values()):
        return True
    import jax

    return jax.process_index() == 0


def _on_host(leaf: Any) -> np.ndarray:
    """All of an array; of one that is spread over processes, a collective."""
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def save_hf(
    directory: str | Path,
    config: Qwen3VLMoeConfig,
    params: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes config.json and safetensors in the hub's layout; the directory appears whole or not at all.

    Where `params` are spread over several processes, all of them call this, and process 0 writes: what one tensor is made of
    is gathered when its turn comes.

    Args:
      directory: new, or empty.
      params: the parameter tree (nested dicts of jax or numpy arrays).
      generation: the object of generation_config.json; None or empty: no such file.
      max_shard_size: bytes of one file's data.
    Raises:
      CheckpointError: the directory is in use, or `params` does not match `config` or holds adapters.
    """
    directory = Path(directory)
    writes = _writes(params)
    if writes and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not empty, expected a new directory; remove it or choose another")
    flat = flatten(params)
    if any(map(is_adapter, flat)):
        raise CheckpointError(
            f"{directory}: the model has adapters, which this format cannot hold, expected the base model; write the adapters "
            "with qvlmoe_jax.peft_format.save_adapter, or merge them: each adds lora.delta to its weight"
        )
    rows = expand(config)
    check_shapes("the parameters to save", param_shapes(config), {path: tuple(leaf.shape) for path, leaf in flat.items()})
    by_key = {row.key: row for row in rows}
    specs = {row.key: (np.dtype(flat[row.path].dtype), row.hf_shape) for row in rows}
    for key, (dtype, _) in specs.items():
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{directory}: {key!r} is {dtype}, which safetensors cannot hold; cast it first")
    common = Counter(dtype for dtype, _ in specs.values()).most_common(1)[0][0]

    def tensor(key: str) -> list[np.ndarray]:
        row = by_key[key]
        leaf = flat[row.path]
        return [row.to_hf(_on_host(leaf[row.index] if row.index else leaf))]

    if not writes:
        for keys in split_shards(specs, max_shard_size).values():
            for key in keys:
                tensor(key)
        return
    with whole_directory(directory, suffix=".saving") as staging:
        write_shards(staging, specs, tensor, max_shard_bytes=max_shard_size)
        for name, value in (("config.json", _hf_config(config, common)), (GENERATION_FILE, generation)):
            if value:
                write_text(staging / name, json.dumps(value, indent=2) + "\n")
