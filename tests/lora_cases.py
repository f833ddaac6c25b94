"""Adapters for tests: factors that are not zero, weights in memory with the surface of a directory's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.lora import LoraConfig, adapter_shapes
from qvlmoe_jax.param_tree import flatten, nest


def random_adapters(model: Qwen3VLMoeForConditionalGeneration, lora: LoraConfig, seed: int = 0) -> dict[str, Any]:
    """Both factors random, so that the adapters move the logits by about as much as the base's."""
    rng = np.random.default_rng(seed)
    shapes = adapter_shapes(model.config, lora)
    return nest({path: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()})


class InMemory:
    """A model's parameters as `checkpoint.Weights`."""

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration):
        self.params = {path: np.asarray(leaf) for path, leaf in flatten(model.params()).items()}
        self.shapes = {path: leaf.shape for path, leaf in self.params.items()}
        self.dtypes = {path: leaf.dtype for path, leaf in self.params.items()}

    def read(self, path: str, index: Any = None, dtype: Any = None, *, copy: bool = True) -> np.ndarray:
        part = self.params[path] if index is None else self.params[path][index]
        return part.astype(dtype or part.dtype, copy=copy)
