"""Models nobody chose: random dimensions, layer patterns and prompts, logits against transformers' at every valid position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests import cases, ours, reference, tiny
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import LOGITS


def random_config(rng: np.random.Generator) -> tiny.ConfigDict:
    """A `config.json` object; every dimension the architecture leaves free is drawn.

    Norms over fewer than 16 numbers are left out: they amplify rounding until transformers' own float32 is 3e-5 from its float64.
    """

    def draw(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    kv, groups = draw(1, 2, 3), draw(1, 2, 4)
    experts, layers = draw(3, 5, 8, 16), int(rng.integers(1, 7))
    head_dim = draw(16, 20, 24, 32)
    dense = [int(i) for i in range(layers) if rng.random() < 0.25]
    depth = int(rng.integers(1, 6))
    taps = [int(i) for i in rng.permutation(depth)[: rng.integers(0, depth + 1)]]
    heads = draw(2, 3, 4)
    hidden = 8 * int(rng.integers(2, 9))
    half = head_dim // 2
    config = tiny.variant(
        tiny.TINY,
        tie_word_embeddings=bool(rng.random() < 0.3),
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 8 * int(rng.integers(2, 12)),
            "num_hidden_layers": layers,
            "num_attention_heads": kv * groups,
            "num_key_value_heads": kv,
            "head_dim": head_dim,
            "num_experts": experts,
            "num_experts_per_tok": int(rng.integers(1, experts + 1)),
            "moe_intermediate_size": 4 * int(rng.integers(1, 10)),
            "mlp_only_layers": dense if rng.random() < 0.5 else [],
            "decoder_sparse_step": draw(1, 1, 2, 3),
            "rope_theta": draw(1e4, 5e5, 5e6),
            "rope_scaling": {"mrope_section": [int(n) for n in rng.multinomial(half, [0.4, 0.3, 0.3])], "rope_type": "default"},
        },
        vision_config={
            "depth": depth,
            "hidden_size": heads * draw(8, 12, 16),
            "intermediate_size": 4 * int(rng.integers(2, 20)),
            "num_heads": heads,
            "out_hidden_size": hidden,
            "patch_size": draw(2, 3, 4),
            "temporal_patch_size": draw(1, 2),
            "spatial_merge_size": draw(1, 2, 3),
            "num_position_embeddings": draw(4, 25, 64),
            "deepstack_visual_indexes": taps,
        },
    )
    return config


def random_rows(rng: np.random.Generator) -> list[cases.Row]:
    """One to three rows of text, pictures and clips, at most 56 tokens each."""

    def part() -> Text | Image | Video:
        kind = rng.integers(3)
        if kind == 0:
            return Text(int(rng.integers(1, 8)))
        height, width = (int(n) for n in rng.integers(1, 4, 2))
        if kind == 1:
            return Image(height, width)
        return Video(
            int(rng.integers(1, 3)), height, min(width, 2), stamp=int(rng.integers(1, 4)), wrapped=bool(rng.random() < 0.3)
        )

    def tokens(part: Text | Image | Video) -> int:
        if isinstance(part, Text):
            return part.length
        area = part.height * part.width + 2
        return area if isinstance(part, Image) else part.frames * (area + part.stamp) + 2 * part.wrapped

    rows = []
    for _ in range(rng.integers(1, 4)):
        row: list[Text | Image | Video] = [Text(int(rng.integers(1, 6)))]
        while rng.random() < 0.7 and sum(map(tokens, row)) < 30:
            row.append(part())
        rows.append([*row, Text(int(rng.integers(1, 6)))])
    return rows


def check(seed: int, record) -> None:
    """One random model on two random prompts, padded on either side."""
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    tensors = random_hf_tensors(config, seed)
    model, theirs = ours.build_model(config, tensors), reference.build_model(config, tensors)
    for padding in ("left", "right"):
        inputs = cases.build(config, random_rows(rng), seed=seed, padding=padding)
        valid = cases.valid(inputs)
        error = np.abs(ours.logits(model, config, inputs) - reference.logits(theirs, inputs))[valid].max()
        record("max |logit error| of random models", error)
        assert error <= LOGITS, (padding, config)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_models(seed: int, record) -> None:
    check(seed, record)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_random_models(seed: int, record) -> None:
    check(seed, record)
