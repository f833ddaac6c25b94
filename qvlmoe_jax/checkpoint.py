"""Opening a model directory, Hugging Face's or a converted one, as jax arrays of any dtype and sharding; saving in HF's form.

A converted directory holds `conversion.json` (where it came from) and `checkpoint/` (Orbax, keys of the parameter tree). A
Hugging Face directory holds `config.json` and safetensors, and is read in place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import TABLE_VERSION, expand, param_shapes
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.param_tree import check_shapes, flatten, nest
from qvlmoe_jax.safetensors_io import DTYPE_NAMES, parse_json
from qvlmoe_jax.shards import write_shards
from qvlmoe_jax.whole_directory import whole_directory

if TYPE_CHECKING:
    import jax

CONVERSION_FILE = "conversion.json"
CHECKPOINT_DIR = "checkpoint"


class ConvertedWeights:
    """A converted directory.

    Attributes:
      config: from its config.json.
      conversion: the parsed conversion.json.
      shapes: parameter path -> shape.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError or ConfigError if a part is missing or was written by another version of the table."""
        self.directory = Path(directory)
        file = self.directory / CONVERSION_FILE
        checkpoint = self.directory / CHECKPOINT_DIR
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint}: not found, expected the Orbax checkpoint beside {CONVERSION_FILE}")
        self.config = Qwen3VLMoeConfig.from_json(self.directory)
        self.conversion = parse_json(file.read_bytes(), str(file))
        version = self.conversion.get("table_version") if isinstance(self.conversion, dict) else None
        if version != TABLE_VERSION:
            raise CheckpointError(f"{file}: table_version is {version!r}, expected {TABLE_VERSION}; convert the source again")
        self.shapes = param_shapes(self.config)

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Parameter path -> dtype on disk.

        Raises:
          CheckpointError: the stored tree is not the one config.json describes.
        """
        from orbax.checkpoint import v1 as ocp

        path = self.directory / CHECKPOINT_DIR
        try:
            tree = ocp.metadata(str(path.resolve())).metadata
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(tree, Mapping):  # Orbax logs what it could not read, and goes on
            raise _unreadable(path, ValueError("its metadata cannot be read"))
        stored = flatten(tree)
        check_shapes(str(path), self.shapes, {key: tuple(leaf.shape) for key, leaf in stored.items()})
        return {key: np.dtype(leaf.dtype) for key, leaf in stored.items()}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{path}: expected a whole Orbax checkpoint, Orbax says: {first_line}; convert the source again")


Weights = HFWeights | ConvertedWeights


def open_weights(directory: str | Path) -> Weights:
    """Recognises and checks a model directory. Imports no jax and reads no weights.

    Raises:
      CheckpointError: it is neither a converted nor a Hugging Face directory, or not a whole one.
      ConfigError: its config.json is missing or refused.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: not a directory, expected a Hugging Face checkpoint (config.json and safetensors) or a converted one "
            f"({CONVERSION_FILE} and {CHECKPOINT_DIR}/)"
        )
    return ConvertedWeights(directory) if (directory / CONVERSION_FILE).exists() else HFWeights(directory)


def load_params(
    directory: str | Path, config: Qwen3VLMoeConfig, *, dtype: DTypeLike | None = None, mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
    """A model directory's parameters: nested dicts of jax arrays, sharded by the one table when there is a mesh.

    Args:
      directory: a Hugging Face checkpoint or a converted one.
      config: the model's; the directory must hold its tree.
      dtype: of every parameter; None keeps each one's own.
      mesh: None leaves the arrays on the default device.
    Raises:
      CheckpointError, ConfigError: what is wrong with the directory, by file or key.
    """
    import jax

    from qvlmoe_jax.sharding import tree_shardings

    weights = open_weights(directory)
    check_shapes(str(directory), param_shapes(config), weights.shapes)
    dtypes = weights.dtypes if dtype is None else dict.fromkeys(weights.shapes, dtype)
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
    flat = flatten(target)
    check_shapes("the target", weights.shapes, {path: tuple(leaf.shape) for path, leaf in flat.items()})
    if isinstance(weights, HFWeights):
        return nest({path: _read_hf(weights, path, leaf) for path, leaf in flat.items()})
    return _restore(weights, flat)


def _read_hf(weights: HFWeights, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    import jax
    import jax.numpy as jnp

    if leaf.sharding is None:
        return jnp.asarray(weights.read(path, dtype=leaf.dtype))
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: weights.read(path, index, leaf.dtype), dtype=leaf.dtype
    )


def _restore(weights: ConvertedWeights, flat: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    import jax
    from orbax.checkpoint import v1 as ocp

    assert weights.dtypes  # checks the stored tree against the config, with clearer words than Orbax's
    # Orbax would otherwise take the sharding of the machine that wrote the checkpoint
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here) for path, leaf in flat.items()}
    path = weights.directory / CHECKPOINT_DIR
    try:
        return ocp.load(str(path.resolve()), nest(abstract))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


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
    directory: str | Path, config: Qwen3VLMoeConfig, params: Mapping[str, Any], *, max_shard_size: int = 5 * 10**9
) -> None:
    """Writes config.json and safetensors in the hub's layout; the directory appears whole or not at all.

    Args:
      directory: new, or empty.
      params: the parameter tree (nested dicts of jax or numpy arrays, all of it addressable from this process).
      max_shard_size: bytes of one file's data.
    Raises:
      CheckpointError: the directory is in use, or `params` does not match `config`.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not empty, expected a new directory; remove it or choose another")
    flat = flatten(params)
    rows = expand(config)
    check_shapes("the parameters to save", param_shapes(config), {path: tuple(leaf.shape) for path, leaf in flat.items()})
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
        write_shards(staging, specs, tensor, max_shard_bytes=max_shard_size)
        (staging / "config.json").write_text(json.dumps(_hf_config(config, common), indent=2) + "\n", encoding="utf-8")
