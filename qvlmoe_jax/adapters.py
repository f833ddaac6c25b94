"""Adapters and quantised weights in a model: the parameters that `lora` describes, put beside or in place of the model's own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qvlmoe_jax.lora import (
    LoraConfig,
    adapter_paths,
    adapter_shapes,
    check_adapters,
    factor_shapes,
    is_adapter,
    linear_dims,
    linears,
    target_paths,
)
from qvlmoe_jax.model import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.quantised import QuantisedWeight
from qvlmoe_jax.remat import is_recomputed
from qvlmoe_jax.sharding import tree_shardings


def adapt(
    model: Qwen3VLMoeForConditionalGeneration, lora: LoraConfig, *, dtype: DTypeLike = jnp.float32
) -> Qwen3VLMoeForConditionalGeneration:
    """The model's structure with room for the adapters, and for the quantised base if there is one; `model` stays as it is.

    The parameters are abstract: fill them with `with_params`, or see `with_adapters`.

    Args:
      dtype: in which quantised weights are expanded: that of the computation.
    Raises:
      ConfigError: `lora.targets` names nothing of this model.
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params())
    adapted = nnx.clone(model.with_params(abstract))
    shapes = linears(model.config)
    if lora.base_quantization is not None:
        for path, shape in shapes.items():
            owner, name = _owner(adapted, path)
            dims = linear_dims(path)
            assert dims is not None
            recomputed = is_recomputed(path, model.backend)
            setattr(owner, name, QuantisedWeight(lora.base_quantization, shape, dims, dtype, recomputed=recomputed))
    for path in target_paths(model.config, lora.targets):
        owner, _ = _owner(adapted, path)
        owner.lora_scale = lora.scale
        for place, shape in zip(adapter_paths(path), factor_shapes(path, shapes[path], lora.rank), strict=True):
            setattr(owner, place.rpartition("/")[2], nnx.data(nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))))
    return adapted


def _owner(model: nnx.Module, path: str) -> tuple[Any, str]:
    """The module that holds the parameter at `path`, and the parameter's name there."""
    *parents, name = path.split("/")
    for parent in parents:
        model = getattr(model, parent)
    return model, name


def init_adapters(
    model: Qwen3VLMoeForConditionalGeneration,
    lora: LoraConfig,
    *,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """New adapters, as PEFT draws them: A uniform within 1 / sqrt(inputs), B zero, so the model's answers are the base's.

    Returns:
      nested dicts of the adapter parameters alone, sharded by the one table when there is a mesh.
    """
    shapes = adapter_shapes(model.config, lora)
    num_inputs = {adapter_paths(path)[0]: (linear_dims(path) or (0, 0))[0] for path in linears(model.config)}

    def one(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        if path.endswith("lora_B"):
            return jnp.zeros(shape, dtype)
        bound = math.prod(shape[-1 - num_inputs[path] : -1]) ** -0.5
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)

    def make(key: jax.Array) -> dict[str, Any]:
        return nest({path: one(path, shape, key) for path, shape in shapes.items()})

    key = jax.random.key(seed)
    shardings = None if mesh is None else tree_shardings(jax.eval_shape(make, key), mesh)
    return jax.jit(make, out_shardings=shardings)(key)


def with_adapters(
    model: Qwen3VLMoeForConditionalGeneration, adapters: Mapping[str, Any], lora: LoraConfig
) -> Qwen3VLMoeForConditionalGeneration:
    """`model` (of full precision) with these adapters, from `init_adapters`, a training run or `peft_format.load_adapter`.

    They are cast to the dtype of the model's weights.

    Raises:
      CheckpointError: they are not those that `lora` describes.
    """
    check_adapters(model.config, adapters, lora)
    dtype = model.get_input_embeddings().weight.dtype
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), dict(adapters))
    return adapt(model, lora).with_params(nest({**flatten(model.params()), **flatten(cast)}))


def split_adapters(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(adapters, base)` of an adapted model's parameters."""
    flat = flatten(params)
    return tuple(nest({p: a for p, a in flat.items() if is_adapter(p) == kind}) for kind in (True, False))  # pyright: ignore[reportReturnType]
