"""Model FLOPs of a training step, vision tower and attention counted, and the peak rates MFU compares them with.

Only what the model needs is counted: valid tokens and patches, chosen experts, causal pairs inside documents, pairs inside
frames. Recomputation and padding are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

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


PARTS = ("vision", "merger", "text", "head")
"""In the order data flows."""


def peak_tflops(device_kind: str) -> float | None:
    """Peak of a device in bf16, by the longest known beginning of its name; None when unknown (CPUs)."""
    known = [name for name in _PEAK_TFLOPS if device_kind.startswith(name)]
    return _PEAK_TFLOPS[max(known, key=len)] if known else None


def forward_flops(config: Qwen3VLMoeConfig, counts: Counts) -> dict[str, float]:
    """Forward FLOPs of each of PARTS, in that order. A product of m x k x n costs 2mkn."""
    text, vision = config.text_config, config.vision_config
    D, N, K, H = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    projections = D * H * (2 * N + 2 * K)
    moe = D * text.num_experts + text.num_experts_per_tok * 3 * D * text.moe_intermediate_size
    per_token = sum(projections + (moe if kind == "moe" else 3 * D * text.intermediate_size) for kind in text.layer_kinds())
    W, I, U = vision.hidden_size, vision.intermediate_size, vision.merge_unit
    per_patch = vision.patch_width * W + vision.depth * (4 * W * W + 2 * W * I)
    merger = (1 + len(vision.deepstack_visual_indexes)) * (U * W) * (U * W + vision.out_hidden_size)
    pairs = attention_flops(config, counts)
    return {
        "vision": 2.0 * counts.patches * per_patch + pairs["vision"],
        "merger": 2.0 * counts.patches / U * merger,
        "text": 2.0 * counts.tokens * per_token + pairs["text"],
        "head": 2.0 * counts.tokens * D * text.vocab_size,
    }


def attention_flops(config: Qwen3VLMoeConfig, counts: Counts) -> dict[str, float]:
    """What of a part's forward FLOPs are products of activations: attention's scores, and its weighted sum of values."""
    text, vision = config.text_config, config.vision_config
    return {
        "vision": 4.0 * counts.frame_pairs * vision.hidden_size * vision.depth,
        "text": 4.0 * counts.token_pairs * text.num_attention_heads * text.head_dim * text.num_hidden_layers,
    }


def step_flops(config: Qwen3VLMoeConfig, counts: Counts, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> float:
    """Forward and backward. From the first trained part on, the backward pass costs one forward for the inputs' gradients, and
    in attention one more, since both factors are inputs; and one for the weights', in proportion to the trained share of what a
    part multiplies with."""
    total, pairs = 0.0, attention_flops(config, counts)
    trained, frozen = flatten(trained), flatten(frozen)
    back = backward_parts(trained)
    for part, flops in forward_flops(config, counts).items():
        train, rest = (
            sum(math.prod(a.shape) * _products(config, part, path) for path, a in tree.items()) for tree in (trained, frozen)
        )
        inner = pairs.get(part, 0.0)
        total += flops + (part in back) * (flops + inner) + (flops - inner) * (train / (train + rest) if train else 0.0)
    return total


def _products(config: Qwen3VLMoeConfig, part: str, path: str) -> float:
    """How often a token or patch passes through a matrix product with the parameter at `path` in this part: norms, biases and
    looked-up tables never, unless the table is the head as well; an expert as often as it is chosen."""
    if "embed_tokens/" in path:
        return float(part == "head" and config.tie_word_embeddings)
    if part_of(path) != part or "pos_embed/" in path or "norm" in path or path.endswith("/bias"):
        return 0.0
    text = config.text_config
    return text.num_experts_per_tok / text.num_experts if "mlp/experts" in path else 1.0


def part_of(path: str) -> str:
    """Which of PARTS the parameter at `path` belongs to."""
    if "visual/" in path:
        return "merger" if "merger" in path else "vision"
    return "head" if path.startswith("lm_head") else "text"


def backward_parts(trained: Iterable[str]) -> tuple[str, ...]:
    """The parts that the backward pass goes through: from the first with a trained parameter, of these paths, on."""
    return PARTS[min(PARTS.index(part_of(path)) for path in trained) :]
