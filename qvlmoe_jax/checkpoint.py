"""Opening a model directory, Hugging Face's or a converted one, as jax arrays of any dtype and sharding.

A converted directory holds `conversion.json` (where it came from) and `checkpoint/` (Orbax, keys of the parameter tree); a Hugging
Face directory holds `config.json` and safetensors, and is read in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import TABLE_VERSION, param_shapes
from qvlmoe_jax.hf_weights import HFWeights, check_shapes
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.safetensors_io import parse_json

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
        if not (self.directory / CHECKPOINT_DIR).is_dir():
            raise CheckpointError(f"{self.directory / CHECKPOINT_DIR}: not found, expected the Orbax checkpoint beside {CONVERSION_FILE}")
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
            stored = flatten(ocp.metadata(str(path.resolve())).metadata)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: not a readable Orbax checkpoint ({_first_line(error)}); convert the source again") from error
        check_shapes(str(path), self.shapes, {key: tuple(leaf.shape) for key, leaf in stored.items()})
        return {key: np.dtype(leaf.dtype) for key, leaf in stored.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def abstract_params(
    weights: Weights, *, dtype: Any = None, shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s, a target for `load_params`.

    Args:
      dtype: of every parameter; None keeps each one's own.
      shardings: '/'-joined path -> sharding; None leaves the arrays on the default device.
    """
    import jax

    return nest({
        path: jax.ShapeDtypeStruct(shape, dtype or weights.dtypes[path], sharding=(shardings or {}).get(path))
        for path, shape in weights.shapes.items()
    })


def load_params(weights: Weights, target: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the whole parameter tree.

    Each process reads only the slices its devices hold.

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
        raise CheckpointError(f"{path}: Orbax cannot restore it ({_first_line(error)}); convert the source again") from error
