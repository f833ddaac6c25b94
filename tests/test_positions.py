"""Rotary tables against torch's, to the last bit that torch itself is sure of; M-RoPE ids against transformers', exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as theirs

from qvlmoe_jax import Batch, Qwen3VLMoeConfig
from qvlmoe_jax.rope import inverse_frequencies, mrope_axis, text_rotary, vision_rotary
from tests import cases, reference, tiny
from tests.cases import Image, Text, Video
from tests.tolerances import ROTARY_ULP

FREQUENCIES = [(128, 5e6), (128, 1e6), (128, 5e5), (32, 5e6), (20, 1e6), (8, 5e6), (36, 1e4), (32, 1e4), (6, 1e4)]
"""Width and theta: the released text models (present, early, 5.x's default), the tiny ones, and vision towers."""


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """Largest distance in units in the last place of two float32 arrays."""

    def ordered(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int(np.abs(ordered(a) - ordered(b)).max())


@pytest.mark.parametrize(("dim", "theta"), FREQUENCIES)
def test_frequencies_are_torchs(dim, theta, record):
    expected = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    error = ulps(inverse_frequencies(dim, theta), expected.numpy())
    record("rotary frequencies, ulp from torch's", error)
    assert error <= ROTARY_ULP


def test_frequencies_are_bit_equal_to_torchs_without_its_vector_library():
    """The one entry in 64 that is 1 ulp off is torch's AVX power (SLEEF); its plain libm power gives our bits."""
    code = "import torch\n" + "".join(
        f"print(*(1.0 / ({theta} ** (torch.arange(0, {dim}, 2, dtype=torch.float) / {dim}))).view(torch.int32).tolist())\n"
        for dim, theta in FREQUENCIES
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    for line, (dim, theta) in zip(printed.splitlines(), FREQUENCIES, strict=True):
        assert inverse_frequencies(dim, theta).view(np.int32).tolist() == [int(word) for word in line.split()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("base", [tiny.TINY, tiny.OTHER, tiny.HF_TEST, tiny.REAL_LAYER], ids=["tiny", "other", "hf_test", "real"])
def test_text_tables(base, compiled, record):
    """From position 0 past 2^17 to the last one of the released models; the frequencies are given (see above)."""
    text = Qwen3VLMoeConfig.from_hf(base).text_config
    rotary = theirs.Qwen3VLMoeTextRotaryEmbedding(reference.MODELS["qwen3_vl_moe"][0].from_dict(tiny.variant(base)).text_config)
    rotary.inv_freq.copy_(torch.from_numpy(inverse_frequencies(text.head_dim, text.rope_theta)))
    spans = np.concatenate([np.arange(600), np.arange(2**17 - 300, 2**17 + 300), np.arange(2**18 - 600, 2**18)])
    positions = np.stack([spans, np.roll(spans, 7), spans[::-1]])[:, None]

    def tables(positions):
        return text_rotary(
            positions, head_dim=text.head_dim, theta=text.rope_theta, mrope_section=text.mrope_section, dtype=jnp.float32
        )

    got = (jax.jit(tables) if compiled else tables)(jnp.asarray(positions, jnp.int32))
    for own, expected in zip(got, rotary(torch.zeros(1), torch.from_numpy(positions)), strict=True):
        error = ulps(np.asarray(own), expected.numpy())
        record("text rotary tables, ulp from torch's", error)
        assert error <= ROTARY_ULP


@pytest.mark.parametrize("base", [tiny.TINY, tiny.OTHER, tiny.HF_TEST, tiny.REAL_BLOCK], ids=["tiny", "other", "hf_test", "real"])
def test_vision_tables(base, record):
    vision = Qwen3VLMoeConfig.from_hf(base).vision_config
    hf_config = reference.MODELS["qwen3_vl_moe"][0].from_dict(tiny.variant(base)).vision_config
    coords = np.random.default_rng(0).integers(0, 512, (1, 400, 2))
    got = vision_rotary(jnp.asarray(coords), head_dim=vision.head_dim, theta=vision.rope_theta)
    rotary = theirs.Qwen3VLMoeVisionRotaryEmbedding(hf_config)
    rotary.inv_freq.copy_(torch.from_numpy(inverse_frequencies(vision.head_dim // 2, vision.rope_theta)))
    for own, expected in zip(got, rotary(torch.zeros(1), torch.from_numpy(coords[0])), strict=True):
        error = ulps(np.asarray(own)[0], expected.numpy())
        record("vision rotary tables, ulp from torch's", error)
        assert error <= ROTARY_ULP


@given(half=st.integers(1, 64), section=st.tuples(*[st.integers(0, 40)] * 3))
def test_interleaving_for_any_sections(half, section):
    """Also sections that do not add up to the head, whose slices clip silently."""
    frequencies = torch.stack([torch.full((half,), float(axis)) for axis in range(3)])
    rotary: Any = SimpleNamespace(mrope_section=section)  # all that the method reads
    expected = theirs.Qwen3VLMoeTextRotaryEmbedding.recomposition_frequencies(rotary, frequencies)
    np.testing.assert_array_equal(mrope_axis(section, half), expected.numpy()[:half])


sides = st.integers(1, 5)
texts = st.builds(Text, st.integers(1, 6))
pictures = st.one_of(
    st.builds(Image, sides, sides, marked=st.booleans()),
    st.builds(Video, st.integers(1, 4), sides, sides, stamp=st.integers(0, 3), wrapped=st.booleans()),
)


@st.composite
def rows(draw) -> list[Text | Image | Video]:
    """Any sequence of text and pictures in which two bare images do not touch: transformers would take them for one."""
    parts: list[Text | Image | Video] = []
    for part in draw(st.lists(st.one_of(texts, pictures), min_size=1, max_size=7)):
        bare = [isinstance(p, Image) and not p.marked for p in (*parts[-1:], part)]
        parts += [Text(1), part] if len(bare) == 2 and all(bare) else [part]
    return parts


@pytest.fixture(scope="module", params=["tiny", "other", "hf_test"])
def oracle(request) -> SimpleNamespace:
    """get_rope_index needs no weights: a model without storage answers as well."""
    config = tiny.ALL[request.param]
    config_class, model_class = reference.MODELS["qwen3_vl_moe"]
    with torch.device("meta"):
        model = model_class(config_class.from_dict(tiny.variant(config)))
    return SimpleNamespace(config=config, own=Qwen3VLMoeConfig.from_hf(config), model=model)


def _inner_words(config: dict[str, Any], inputs: cases.Inputs) -> list[tuple[int, int]]:
    """(row, column) of the words between two words: masking them out leaves pictures as far apart as they were."""
    special = [config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")]
    word = (inputs["attention_mask"] == 1) & ~np.isin(inputs["input_ids"], special)
    inner = np.zeros_like(word)
    inner[:, 1:-1] = word[:, :-2] & word[:, 1:-1] & word[:, 2:]
    return [tuple(at) for at in np.argwhere(inner)]


@settings(max_examples=300)
@given(data=st.data())
def test_position_ids_for_any_input(oracle, data):
    """Every sequence of pictures, clips and text, padded on either side, with holes in the attention mask."""
    batch_rows = data.draw(st.lists(rows(), min_size=1, max_size=3))
    padding = data.draw(st.sampled_from(["left", "right"]))
    inputs = cases.build(oracle.config, batch_rows, seed=data.draw(st.integers(0, 99)), padding=padding)
    if "mm_token_type_ids" not in inputs:
        return  # transformers computes no positions without pictures
    words = _inner_words(oracle.config, inputs)
    for b, t in data.draw(st.lists(st.sampled_from(words), max_size=3)) if words else []:
        inputs["attention_mask"][b, t] = 0
    got = Batch.from_hf(oracle.own, **inputs).position_ids
    expected = reference.position_ids(oracle.model, inputs)
    length = expected.shape[-1]
    np.testing.assert_array_equal(got[:, :, :length], expected)
    assert not got[:, :, length:].any()
