"""`config.json` objects for tests: the released models as the hub has them, and tiny ones whose every dimension differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def hub_30b() -> dict[str, Any]:
    """Qwen3-VL-30B-A3B's config.json."""
    return json.loads((DATA / "config_30b_a3b.json").read_text())


def hub_4b() -> dict[str, Any]:
    """Qwen3-VL-4B's config.json (dense, tied)."""
    return json.loads((DATA / "config_4b.json").read_text())


def hub_235b() -> dict[str, Any]:
    """Qwen3-VL-235B-A22B: the 30B's file with the facts that differ."""
    return edited(
        hub_30b(),
        text={"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94},
        vision={"out_hidden_size": 4096},
    )


def tiny_moe() -> dict[str, Any]:
    """Five layers, the second dense; three DeepStack taps; no two dimensions equal, so a transposed axis cannot hide."""
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": 250,
        "video_token_id": 251,
        "vision_start_token_id": 252,
        "vision_end_token_id": 253,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0",
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "max_position_embeddings": 4096,
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": 5,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 2, 3],
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def tiny_dense(tied: bool = True) -> dict[str, Any]:
    """The dense `qwen3_vl` of the same size, tied as the small released ones are."""
    config = tiny_moe()
    moe_keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "decoder_sparse_step", "norm_topk_prob")
    for key in moe_keys:
        del config["text_config"][key]
    config.update(
        architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl", tie_word_embeddings=tied
    )
    config["text_config"]["model_type"] = "qwen3_vl_text"
    config["vision_config"]["model_type"] = "qwen3_vl"
    return config


def edited(config: dict[str, Any], text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A copy of `config` with keys of its text section, vision section and top level replaced."""
    config = copy.deepcopy(config)
    config["text_config"].update(text or {})
    config["vision_config"].update(vision or {})
    config.update(top)
    return config
