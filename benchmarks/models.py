"""The models that are measured: 30B-A3B's decoder and tower at a quarter of their widths, and both sides around equal weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.machine import CORES
from qvlmoe_jax import BackendConfig, Qwen3VLMoeForConditionalGeneration
from tests import ours, reference, tiny
from tests.hf_checkpoints import random_hf_tensors

SETTINGS = {
    "grouped_mm + sdpa": ("grouped_mm", "sdpa"),
    "eager + sdpa": ("eager", "sdpa"),
    "grouped_mm + eager": ("grouped_mm", "eager"),
}


def quarter(layers: int, *, depth: int | None = None, experts: int = 128, vocab_size: int = 32768) -> dict[str, Any]:
    """A `config.json` object: true ratios (128 experts, 8 per token, 8 query heads per kv head), `layers` decoder layers."""
    depth = layers if depth is None else depth
    taps = [i for i in (0, 1, 2) if i < depth]
    return tiny.variant(
        tiny.TINY,
        text_config=dict(
            vocab_size=vocab_size, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=1, head_dim=128, num_experts=experts, num_experts_per_tok=8, moe_intermediate_size=192,
            mlp_only_layers=[], rope_scaling={"mrope_section": [24, 20, 20]},
        ),
        vision_config=dict(
            depth=depth, hidden_size=288, intermediate_size=1076, num_heads=4, out_hidden_size=512, patch_size=16,
            num_position_embeddings=2304, deepstack_visual_indexes=taps,
        ),
    )  # fmt: skip


class Both:
    """One set of random weights in both libraries; float32."""

    def __init__(self, config: dict[str, Any], backend: BackendConfig | None = None):
        self.config = config
        self.tensors = random_hf_tensors(config)
        self.ours: Qwen3VLMoeForConditionalGeneration = ours.build_model(config, self.tensors, backend or BackendConfig())
        self._theirs: dict[str, Any] = {}

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    def theirs(self, setting: str) -> Any:
        """transformers' model with one of SETTINGS."""
        experts, attention = SETTINGS[setting]
        if setting not in self._theirs:
            self._theirs[setting] = reference.build_model(self.config, self.tensors, attention=attention, experts=experts)
            self._theirs[setting].generation_config.eos_token_id = None
            torch.set_num_threads(CORES)
        return self._theirs[setting]


def random_ids(config: dict[str, Any], rows: int, length: int) -> np.ndarray:
    """`[rows, length]`, none of them special."""
    special = [config[k] for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")]
    return np.random.default_rng(0).integers(0, min(special), (rows, length))
