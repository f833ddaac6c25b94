"""The model under test around given weights, and its answers trimmed to the shape of transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, hf
from qvlmoe_jax.param_tree import nest


def params(config: Qwen3VLMoeConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree from hub-layout tensors, through the table but without a file."""

    def fill(rows: tuple[hf.Row, ...]) -> jax.Array:
        slices = [row.to_param(tensors[row.key]) for row in rows]
        return jnp.asarray(np.stack(slices) if rows[0].index else slices[0])

    return nest({path: fill(rows) for path, rows in hf.rows_by_path(hf.expand(config)).items()})


def build_model(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], backend: BackendConfig | None = None
) -> Qwen3VLMoeForConditionalGeneration:
    """The model for a `config.json` object with these weights (hub layout)."""
    own = Qwen3VLMoeConfig.from_hf(config)
    return Qwen3VLMoeForConditionalGeneration.abstract(own, backend=backend).with_params(params(own, tensors))


def make_batch(config: Mapping[str, Any], inputs: Mapping[str, np.ndarray], **fields: Any) -> Batch:
    """A Batch in the one static shape that every case fits, so that a config compiles once."""
    own = Qwen3VLMoeConfig.from_hf(config)
    sizes = {"text_length": 64, "vision_rows": 4, "row_patches": 32 * own.vision_config.merge_unit}
    return Batch.from_hf(own, **inputs, **(sizes | fields))


@jax.jit
def forward(model: Qwen3VLMoeForConditionalGeneration, batch: Batch) -> jax.Array:
    return model(batch).logits


def logits(model: Qwen3VLMoeForConditionalGeneration, config: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """fp32 logits [B,T,V] for the input's own columns, without the padding of the static shape."""
    out = np.asarray(forward(model, make_batch(config, inputs)), np.float32)
    return out[:, : inputs["input_ids"].shape[1]]


def layer(stacked: Any, index: int) -> Any:
    """One layer of a stacked module."""
    return jax.tree.map(lambda p: p[index], stacked)
