"""A run that trains adapters alone: its base, held apart and read again at each start, and where its adapters begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qvlmoe_jax import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.adapter_run import base_identity, read_lora, write_lora
from qvlmoe_jax.adapters import init_adapters
from qvlmoe_jax.checkpoint import RUN_LORA, Weights, load_tree, open_weights
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.lora import LoraConfig, target_paths
from qvlmoe_jax.param_tree import nest
from qvlmoe_jax.peft_format import load_adapter
from qvlmoe_jax.quantised_base import QuantisedBase
from qvlmoe_jax.sharding import tree_shardings
from train.config import LoraSection, TrainConfig
from train.errors import TrainingError


def as_library(section: LoraSection) -> LoraConfig:
    """The section without what concerns training alone."""
    return LoraConfig(section.rank, section.alpha, section.rslora, section.targets, section.base_quantization)


def first_adapters(config: TrainConfig, model: Qwen3VLMoeForConditionalGeneration, mesh: Mesh | None) -> dict[str, Any]:
    """The adapters of step 0: those of `lora.adapter`, or new ones.

    Raises:
      ConfigError: the adapter is of another rank, scale or set of targets than the config says.
    """
    assert config.lora is not None
    dtype = jnp.dtype(config.model.param_dtype)
    if config.lora.adapter is None:
        return init_adapters(model, as_library(config.lora), seed=config.seed, dtype=dtype, mesh=mesh)
    found, adapters = load_adapter(config.lora.adapter, model.config)
    _check_same(config.lora, found, model.config)
    shardings = None if mesh is None else tree_shardings(adapters, mesh)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), adapters)
    return jax.device_put(cast, shardings)


def _check_same(section: LoraSection, found: LoraConfig, model: Qwen3VLMoeConfig) -> None:
    for name in ("rank", "alpha", "rslora"):
        asked, there = getattr(section, name), getattr(found, name)
        if asked != there:
            raise ConfigError(f"lora.{name} = {asked}, but {section.adapter} has {there}; expected lora.{name}: {there}")
    different = sorted({*target_paths(model, section.targets)} ^ {*target_paths(model, found.targets)})
    if different:
        raise ConfigError(
            f"lora.targets: {section.adapter} and the config differ in {len(different)} weights, first {different[0]!r}; "
            "expected targets that name what the adapter holds"
        )


def load_base(config: TrainConfig, weights: Weights, mesh: Mesh | None) -> dict[str, Any]:
    """The frozen base in compute_dtype, its linears quantised if the config asks for it; each device reads its own part."""
    assert config.lora is not None
    dtype = np.dtype(jnp.dtype(config.model.compute_dtype))
    kind = config.lora.base_quantization
    source: Any = weights if kind is None else QuantisedBase(weights, kind, dtype)
    dtypes = dict.fromkeys(source.shapes, dtype) if kind is None else source.dtypes
    target = nest({path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in source.shapes.items()})
    if mesh is not None:
        target = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), target, tree_shardings(target, mesh))
    return load_tree(source, target)


class Base:
    """The base of one run: opened, known by its identity, refused when it is another than the run began with."""

    def __init__(self, config: TrainConfig):
        """Raises TrainingError if the run was started from other weights."""
        self.config, self.run = config, Path(config.run)
        self.weights = open_weights(config.model.path)
        self.identity = base_identity(self.weights)
        if (self.run / RUN_LORA).exists():
            _, path, identity = read_lora(self.run)
            if identity != self.identity:
                raise TrainingError(
                    f"model.path {config.model.path} is not the base that {self.run} was started from ({path}); expected the "
                    "same weights: give that path, or start in another run directory"
                )

    def record(self) -> None:
        """Writes `RUN/lora.json`, which says what the checkpoints' adapters belong to."""
        assert self.config.lora is not None
        write_lora(self.run, as_library(self.config.lora), Path(self.config.model.path), self.identity)
