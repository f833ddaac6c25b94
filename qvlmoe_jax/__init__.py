"""Qwen3-VL-MoE in JAX/Flax.

The public names below are imported on first use (PEP 562), so that reading a config or asking a command for `--help` does
not wait for jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvlmoe_jax import errors
    from qvlmoe_jax.backend import BackendConfig
    from qvlmoe_jax.batch import Batch
    from qvlmoe_jax.config import Qwen3VLMoeConfig, Qwen3VLMoeTextConfig, Qwen3VLMoeVisionConfig
    from qvlmoe_jax.model import ModelOutput, Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel
    from qvlmoe_jax.model import Qwen3VLMoeForConditionalGeneration as ModelClass
    from qvlmoe_jax.processor import Processor
    from qvlmoe_jax.sharding import make_mesh
    from qvlmoe_jax.text import Qwen3VLMoeTextModel
    from qvlmoe_jax.vision import Qwen3VLMoeVisionModel

__version__ = "0.1.0"

__all__ = [
    "BackendConfig",
    "Batch",
    "ModelClass",
    "ModelOutput",
    "Processor",
    "Qwen3VLMoeConfig",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLMoeModel",
    "Qwen3VLMoeTextConfig",
    "Qwen3VLMoeTextModel",
    "Qwen3VLMoeVisionConfig",
    "Qwen3VLMoeVisionModel",
    "errors",
    "make_mesh",
]

_HOME = {  # public name -> (module, name there; None = the module itself)
    "BackendConfig": ("backend", "BackendConfig"),
    "Batch": ("batch", "Batch"),
    "ModelClass": ("model", "Qwen3VLMoeForConditionalGeneration"),
    "ModelOutput": ("model", "ModelOutput"),
    "Processor": ("processor", "Processor"),
    "Qwen3VLMoeConfig": ("config", "Qwen3VLMoeConfig"),
    "Qwen3VLMoeForConditionalGeneration": ("model", "Qwen3VLMoeForConditionalGeneration"),
    "Qwen3VLMoeModel": ("model", "Qwen3VLMoeModel"),
    "Qwen3VLMoeTextConfig": ("config", "Qwen3VLMoeTextConfig"),
    "Qwen3VLMoeTextModel": ("text", "Qwen3VLMoeTextModel"),
    "Qwen3VLMoeVisionConfig": ("config", "Qwen3VLMoeVisionConfig"),
    "Qwen3VLMoeVisionModel": ("vision", "Qwen3VLMoeVisionModel"),
    "errors": ("errors", None),
    "make_mesh": ("sharding", "make_mesh"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _HOME[name]
    module = importlib.import_module(f"{__name__}.{module_name}")
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value  # later lookups skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
