"""Model FLOPs of a training step, vision tower and attention counted, and the peak rates MFU compares them with.

Only what the model needs is counted: valid tokens and patches, chosen experts, causal pairs inside documents, pairs inside
frames. Recomputation and padding are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.param_tree import flatten
from train.feed import Counts

# bf16 dense TFLOP/s of one device as jax counts devices (v4 and 7x: shared/published chip figures halved per core).
_PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def peak_tflops(device_kind: str) -> float | None:
    """Peak of a device in bf16, by the longest known beginning of its name; None when unknown (CPUs)."""
    known = [name for name in _PEAK_TFLOPS if device_kind.startswith(name)]
    return _PEAK_TFLOPS[max(known, key=len)] if known else None


def forward_flops(config: Qwen3VLMoeConfig, counts: Counts) -> dict[str, float]:
    """Forward FLOPs by part, in the order data flows: `vision`, `merger`, `text`, `head`. A product of m x k x n costs 2mkn."""
    text, vision = config.text_config, config.vision_config
    D, N, K, H = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    projections = D * H * (2 * N + 2 * K)
    moe = D * text.num_experts + text.num_experts_per_tok * 3 * D * text.moe_intermediate_size
    per_token = sum(projections + (moe if kind == "moe" else 3 * D * text.intermediate_size) for kind in text.layer_kinds())
    pairs = counts.token_pairs * 2 * N * H * text.num_hidden_layers  # scores, and the weighted sum of values
    W, I, U = vision.hidden_size, vision.intermediate_size, vision.merge_unit
    per_patch = vision.patch_width * W + vision.depth * (4 * W * W + 2 * W * I)
    merger = (1 + len(vision.deepstack_visual_indexes)) * (U * W) * (U * W + vision.out_hidden_size)
    return {
        "vision": 2.0 * (counts.patches * per_patch + counts.frame_pairs * 2 * W * vision.depth),
        "merger": 2.0 * counts.patches / U * merger,
        "text": 2.0 * (counts.tokens * per_token + pairs),
        "head": 2.0 * counts.tokens * D * text.vocab_size,
    }


def step_flops(config: Qwen3VLMoeConfig, counts: Counts, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> float:
    """Forward and backward. The backward pass costs one forward for the inputs' gradients, from the first trained part on, and
    one for the weights', in proportion to the trained share of a part's parameters."""
    total, below = 0.0, False
    for part, flops in forward_flops(config, counts).items():
        train, rest = (sum(int(np.prod(a.shape)) for p, a in flatten(t).items() if _part(p) == part) for t in (trained, frozen))
        share = train / (train + rest) if train + rest else float(below)
        below = below or train > 0
        total += flops * (1 + below + share)
    return total


def _part(path: str) -> str:
    if "visual/" in path:
        return "merger" if "merger" in path else "vision"
    return "head" if path.startswith("lm_head") else "text"
