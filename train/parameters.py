"""Which parameters a run trains and which it only reads, as shapes: what the planner's formulas count."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qvlmoe_jax import Qwen3VLMoeConfig, hf
from qvlmoe_jax.lora import adapter_shapes
from qvlmoe_jax.param_tree import flatten, nest
from train.config import TrainConfig
from train.lora import as_library
from train.optim import split_frozen


def parameters(config: TrainConfig, model: Qwen3VLMoeConfig) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`(trained, frozen)`, path -> array of its shape that takes no memory. A LoRA run trains its adapters and reads the model.

    Raises:
      ConfigError: a `model.freeze` pattern or a LoRA target that matches nothing.
    """
    whole = _stand_ins(hf.param_shapes(model))
    if config.lora is not None:
        return _stand_ins(adapter_shapes(model, as_library(config.lora))), whole
    trained, frozen = split_frozen(nest(whole), config.model.freeze)
    return flatten(trained), flatten(frozen)


def _stand_ins(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {path: np.broadcast_to(np.int8(0), shape) for path, shape in shapes.items()}
