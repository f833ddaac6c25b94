"""Small model configurations, as `config.json` objects in the hub's spelling.

No two dimensions of a configuration are equal unless the test is about that equality: an axis swapped by mistake then
changes a shape, or at least a number.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

ConfigDict = dict[str, Any]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> ConfigDict:
    out = copy.deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if nested else copy.deepcopy(value)
    return out


def variant(base: ConfigDict, **changes: Any) -> ConfigDict:
    """A deep copy of `base` with nested `changes`, e.g. `variant(TINY, text_config={"num_experts": 4})`."""
    return _merge(base, changes)


def _text(model_type: str = "qwen3_vl_moe_text", *, mrope_section: list[int], **fields: Any) -> ConfigDict:
    return {
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "initializer_range": 0.02,
        "rope_theta": 5e6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": mrope_section, "rope_type": "default"},
        **fields,
    }


def _moe(num_experts: int, num_experts_per_tok: int, moe_intermediate_size: int, **fields: Any) -> ConfigDict:
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": moe_intermediate_size,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        **fields,
    }


def _vision(model_type: str = "qwen3_vl_moe", **fields: Any) -> ConfigDict:
    return {"model_type": model_type, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "initializer_range": 0.02, **fields}


def _model(text: ConfigDict, vision: ConfigDict, ids: tuple[int, int, int, int], **top: Any) -> ConfigDict:
    image, video, start, end = ids
    moe = text["model_type"] == "qwen3_vl_moe_text"
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
        "transformers_version": "4.57.0",
        "tie_word_embeddings": False,
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "text_config": text,
        "vision_config": vision,
        **top,
    }


TINY = _model(
    _text(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, mrope_section=[6, 5, 5], **_moe(8, 3, 24, mlp_only_layers=[1]),
    ),
    _vision(
        depth=5, hidden_size=48, intermediate_size=80, num_heads=4, out_hidden_size=64, patch_size=4, temporal_patch_size=2,
        spatial_merge_size=2, num_position_embeddings=49, deepstack_visual_indexes=[0, 2, 3],
    ),
    (250, 251, 252, 253),
)  # fmt: skip
"""Five layers, the second of them dense; three DeepStack taps, none of them equal to the layer it feeds but the first."""

OTHER = _model(
    _text(
        vocab_size=300, hidden_size=72, intermediate_size=104, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
        head_dim=20, mrope_section=[4, 3, 3], **_moe(5, 2, 28), rms_norm_eps=1e-5, rope_theta=1e6,
    ),
    _vision(
        depth=7, hidden_size=56, intermediate_size=92, num_heads=2, out_hidden_size=72, patch_size=6, temporal_patch_size=1,
        spatial_merge_size=3, in_channels=2, num_position_embeddings=25, deepstack_visual_indexes=[5, 1],
    ),
    (11, 17, 13, 19),
)  # fmt: skip
"""No dimension in common with TINY; the DeepStack list is not sorted, so mergers and levels come in different orders."""

HF_TEST = _model(
    _text(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mrope_section=[16, 8, 8], **_moe(8, 4, 16),
    ),
    _vision(
        depth=2, hidden_size=32, intermediate_size=32, num_heads=4, out_hidden_size=32, patch_size=16, temporal_patch_size=2,
        spatial_merge_size=1, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    ),
    (3, 4, 5, 6),
)  # fmt: skip
"""The dimensions of transformers' own tests: no merging, and M-RoPE sections wider than the head, which clip silently."""

UNIFORM = variant(TINY, text_config={"num_hidden_layers": 3, "mlp_only_layers": []})
"""Every layer MoE; as many layers as DeepStack levels."""

MIXED = variant(TINY, text_config={"num_hidden_layers": 6, "mlp_only_layers": [], "decoder_sparse_step": 2})
"""Dense and MoE layers in turn (`decoder_sparse_step` 2)."""

IRREGULAR = variant(TINY, text_config={"num_hidden_layers": 7, "mlp_only_layers": [0, 3, 4, 6]})
"""Dense layers at no regular distance."""

DENSE = _model(
    _text(
        "qwen3_vl_text", vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, mrope_section=[6, 5, 5],
    ),
    _vision(**(TINY["vision_config"] | {"model_type": "qwen3_vl"})),
    (250, 251, 252, 253),
)  # fmt: skip
"""The dense sibling `qwen3_vl`."""

TIED = variant(TINY, tie_word_embeddings=True)
DENSE_TIED = variant(DENSE, tie_word_embeddings=True)

SQUARE_2I = variant(TINY, text_config={"moe_intermediate_size": 32})
"""2I == H: `gate_up_proj` is square, so its layout on disk shows only in `down_proj`."""
SQUARE_I = variant(TINY, text_config={"moe_intermediate_size": 64})
"""I == H: `down_proj` is square."""

NO_DEEPSTACK = variant(TINY, vision_config={"deepstack_visual_indexes": []})
"""A tower without DeepStack levels."""

REAL_LAYER = variant(
    TINY,
    text_config=dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, mlp_only_layers=[],
        rope_scaling={"mrope_section": [24, 20, 20]},
    ),
    vision_config=dict(out_hidden_size=2048, depth=1, deepstack_visual_indexes=[0]),
)  # fmt: skip
"""One decoder layer of 30B-A3B at its true width (2.4 GB of experts in fp32) under a tiny tower and vocabulary."""

REAL_BLOCK = variant(
    TINY,
    vision_config=dict(
        depth=1, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, num_position_embeddings=2304,
        deepstack_visual_indexes=[0],
    ),
)  # fmt: skip
"""One vision block, merger and DeepStack merger at 30B-A3B's true width (head_dim 72) before a tiny decoder."""

ALL: dict[str, ConfigDict] = {
    "tiny": TINY,
    "other": OTHER,
    "hf_test": HF_TEST,
    "uniform": UNIFORM,
    "mixed": MIXED,
    "irregular": IRREGULAR,
    "dense": DENSE,
    "dense_tied": DENSE_TIED,
    "tied": TIED,
    "square_2i": SQUARE_2I,
    "square_i": SQUARE_I,
    "no_deepstack": NO_DEEPSTACK,
}
"""The small ones, by name."""
