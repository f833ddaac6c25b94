"""The table: the released models' tensors to the last one, invertible on any config, and both expert layouts told apart."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import ExpertLayout, expand, param_shapes
from qvlmoe_jax.hf_weights import HFWeights
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.hub_configs import HUB_4B, HUB_30B, HUB_235B
from tests.tiny import ConfigDict, variant

RELEASED = [
    pytest.param(HUB_30B, 882, 31_070_754_032, id="30B-A3B"),
    pytest.param(HUB_4B, 713, 4_437_815_808, id="4B"),
    pytest.param(HUB_235B, 1388, 235_670_022_896, id="235B-A22B"),
]
EXPERTS = "model.language_model.layers.{}.mlp.experts.{}"


@pytest.mark.parametrize(("config", "tensors", "parameters"), RELEASED)
def test_the_released_models_have_exactly_these_tensors(config: ConfigDict, tensors: int, parameters: int) -> None:
    parsed = Qwen3VLMoeConfig.from_hf(config)
    for layout in ("hub", "v5"):
        rows = expand(parsed, layout)
        assert len({row.key for row in rows}) == len(rows) == tensors
        assert sum(math.prod(row.hf_shape) for row in rows) == parameters
    assert sum(map(math.prod, param_shapes(parsed).values())) == parameters


def test_the_documentation_lists_this_tree() -> None:
    text = (Path(__file__).parents[1] / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    listed = {path: json.loads(shape) for path, shape in re.findall(r"^\| `([^`]+)` \| (\[[^]]*\]) \|", text, re.MULTILINE)}
    assert listed == {path: list(shape) for path, shape in param_shapes(Qwen3VLMoeConfig.from_hf(HUB_30B)).items()}


@pytest.mark.parametrize("name", [*tiny.ALL, "30B-A3B", "4B", "235B-A22B"])
def test_names_and_shapes_are_those_of_the_modules_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = copy.deepcopy({**tiny.ALL, "30B-A3B": HUB_30B, "4B": HUB_4B, "235B-A22B": HUB_235B}[name])  # HF writes into it
    moe = config["model_type"] == "qwen3_vl_moe"
    config_class, model_class = (
        (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration)
        if moe
        else (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration)
    )
    with torch.device("meta"):
        model = model_class(config_class(**config))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del expected["lm_head.weight"]  # in the module, not in its file
    assert {row.key: row.hf_shape for row in expand(Qwen3VLMoeConfig.from_hf(config), "v5")} == expected


@st.composite
def configs(draw: st.DrawFn) -> Qwen3VLMoeConfig:
    """Tiny models of any shape: which layers are dense, which blocks are tapped in which order, tied or not."""
    size = st.integers(1, 3)
    layers, depth, heads = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(size)
    hidden = 2 * draw(size)
    moe = draw(st.booleans())
    text = dict(
        vocab_size=draw(st.integers(20, 23)), hidden_size=hidden, intermediate_size=draw(size), num_hidden_layers=layers,
        num_attention_heads=2 * heads, num_key_value_heads=heads, head_dim=2 * draw(size), num_experts=draw(size),
        num_experts_per_tok=1, moe_intermediate_size=draw(size), decoder_sparse_step=draw(st.integers(1, 3)),
        mlp_only_layers=draw(st.lists(st.integers(0, layers - 1), unique=True)),
    )  # fmt: skip
    vision = dict(
        depth=depth, hidden_size=heads * 4, num_heads=heads, intermediate_size=draw(size), out_hidden_size=hidden,
        patch_size=draw(size), temporal_patch_size=draw(size), spatial_merge_size=draw(size), in_channels=draw(size),
        num_position_embeddings=draw(size) ** 2,
        deepstack_visual_indexes=draw(st.lists(st.integers(0, depth - 1), unique=True)),
    )  # fmt: skip
    ids = {key: tiny.OTHER[key] for key in tiny.OTHER if key.endswith("_token_id")}
    tied = draw(st.booleans())
    model_type = "qwen3_vl_moe" if moe else "qwen3_vl"
    return Qwen3VLMoeConfig.from_hf(
        {"model_type": model_type, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **ids}
    )


@given(configs(), st.sampled_from(("hub", "v5")))
def test_the_table_is_a_bijection(config: Qwen3VLMoeConfig, layout: ExpertLayout) -> None:
    """Every number of every tensor has one place in the tree, every place gets one, and the way back undoes the way there."""
    rows = expand(config, layout)
    params = {path: np.full(shape, -1, np.int64) for path, shape in param_shapes(config).items()}
    start = 0
    tensors = {}
    for row in rows:
        size = math.prod(row.hf_shape)
        tensors[row.key] = np.arange(start, start + size).reshape(row.hf_shape)
        start += size
        part = params[row.path][row.index]
        assert part.shape == row.shape
        assert (part == -1).all()
        params[row.path][row.index] = row.to_param(tensors[row.key])
    assert sorted(np.concatenate([param.ravel() for param in params.values()]).tolist()) == list(range(start))
    for row in rows:
        np.testing.assert_array_equal(row.to_hf(params[row.path][row.index]), tensors[row.key])


def placed(config: ConfigDict, layout: Literal["hub", "v5"] = "hub") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random tensors by HF key, and the parameters the table makes of them."""
    tensors = random_hf_tensors(config, layout=layout)
    parsed = Qwen3VLMoeConfig.from_hf(config)
    params = {path: np.empty(shape, np.float32) for path, shape in param_shapes(parsed).items()}
    for row in expand(parsed, layout):
        params[row.path][row.index] = row.to_param(tensors[row.key])
    return tensors, params


def test_orientation_of_every_kind_of_tensor() -> None:
    """Said again without the table: what `x @ W` and the einsums of the network expect."""
    tensors, params = placed(tiny.UNIFORM)
    layer, base = "model.language_model.layers.1.", "model/language_model/layers/"
    x = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)

    def close(found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, atol=1e-5)

    q = x @ tensors[layer + "self_attn.q_proj.weight"].T
    close(np.einsum("TD,DNH->TNH", x, params[base + "self_attn/q_proj/weight"][1]), q.reshape(7, 4, 32))
    context = np.random.default_rng(1).standard_normal((7, 4, 32)).astype(np.float32)
    o = context.reshape(7, 128) @ tensors[layer + "self_attn.o_proj.weight"].T
    close(np.einsum("TNH,NHD->TD", context, params[base + "self_attn/o_proj/weight"][1]), o)
    close(x @ params[base + "mlp/gate/weight"][1], x @ tensors[layer + "mlp.gate.weight"].T)
    gate_up = params[base + "mlp/experts/gate_up_proj"][1]
    fused = x @ tensors[layer + "mlp.experts.gate_up_proj"][3]
    close(x @ gate_up[3, :, 0], fused[:, :24])
    close(x @ gate_up[3, :, 1], fused[:, 24:])
    close(params[base + "mlp/experts/down_proj"][1], tensors[layer + "mlp.experts.down_proj"])

    v, block = np.random.default_rng(2).standard_normal((7, 48)).astype(np.float32), "model.visual.blocks.2."
    qkv = v @ tensors[block + "attn.qkv.weight"].T + tensors[block + "attn.qkv.bias"]
    weight, bias = (params[f"model/visual/blocks/attn/qkv/{name}"][2] for name in ("weight", "bias"))
    close(np.einsum("TD,DCNH->TCNH", v, weight) + bias, qkv.reshape(7, 3, 4, 12))
    patch = np.random.default_rng(3).standard_normal((3, 2, 4, 4)).astype(np.float32)
    kernel = tensors["model.visual.patch_embed.proj.weight"]
    close(patch.ravel() @ params["model/visual/patch_embed/proj/weight"], np.einsum("DCTHW,CTHW->D", kernel, patch))
    close(x @ params["lm_head/weight"], x @ tensors["lm_head.weight"].T)
    embedding = tensors["model.language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["model/language_model/embed_tokens/weight"], embedding)


def test_deepstack_mergers_keep_the_order_of_the_list() -> None:
    assert tiny.OTHER["vision_config"]["deepstack_visual_indexes"] == [5, 1]
    tensors, params = placed(tiny.OTHER)
    for i in range(2):
        np.testing.assert_array_equal(
            params["model/visual/deepstack_merger_list/linear_fc2/bias"][i],
            tensors[f"model.visual.deepstack_merger_list.{i}.linear_fc2.bias"],
        )


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("uniform", {"": [0, 1, 2]}),
        ("mixed", {"0/": [0, 2, 4], "1/": [1, 3, 5]}),
        ("tiny", {"0/": [0], "1/": [1], "2/": [2, 3, 4]}),
    ],
)
def test_layers_lie_in_their_slots_in_order(name: str, stacks: dict[str, list[int]]) -> None:
    tensors, params = placed(tiny.ALL[name])
    for slot, layers in stacks.items():
        np.testing.assert_array_equal(
            params[f"model/language_model/layers/{slot}input_layernorm/weight"],
            np.stack([tensors[f"model.language_model.layers.{layer}.input_layernorm.weight"] for layer in layers]),
        )
    kinds = Qwen3VLMoeConfig.from_hf(tiny.ALL[name]).text_config.layer_kinds()
    for slot, layers in stacks.items():
        assert (f"model/language_model/layers/{slot}mlp/experts/down_proj" in params) == (kinds[layers[0]] == "moe")
        assert (f"model/language_model/layers/{slot}mlp/down_proj/weight" in params) == (kinds[layers[0]] == "dense")


@pytest.mark.parametrize("name", ["tiny", "square_2i", "square_i", "mixed"])
def test_both_layouts_of_one_model_give_the_same_parameters(name: str, tmp_path: Path) -> None:
    config = tiny.ALL[name]
    weights = {}
    for layout in ("hub", "v5"):
        tensors = random_hf_tensors(config, layout=layout)
        weights[layout] = HFWeights(write_hf_checkpoint(tmp_path / layout, config, tensors))
        assert weights[layout].match.expert_layout == layout
    for path in weights["hub"].shapes:
        np.testing.assert_array_equal(weights["hub"].read(path), weights["v5"].read(path))


def test_a_dense_model_has_no_expert_layout(tmp_path: Path) -> None:
    weights = HFWeights(write_hf_checkpoint(tmp_path, tiny.DENSE, random_hf_tensors(tiny.DENSE)))
    assert weights.match.expert_layout is None


def mixed_layouts(config: ConfigDict, flipped: list[str]) -> dict[str, np.ndarray]:
    """The hub layout, but `flipped` tensors in the v5 one."""
    return random_hf_tensors(config) | {key: random_hf_tensors(config, layout="v5")[key] for key in flipped}


def test_a_pair_of_tensors_that_contradict_each_other_is_refused(tmp_path: Path) -> None:
    down = EXPERTS.format(2, "down_proj")
    write_hf_checkpoint(tmp_path, tiny.TINY, mixed_layouts(tiny.TINY, [down]))
    with pytest.raises(CheckpointError, match=r"layers\.2\..*gate_up_proj.*hub layout.*down_proj.*v5 layout"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("name", ["tiny", "square_2i", "square_i"])
def test_layers_that_disagree_are_refused(name: str, tmp_path: Path) -> None:
    flipped = [EXPERTS.format(3, part) for part in ("gate_up_proj", "down_proj")]
    write_hf_checkpoint(tmp_path, tiny.ALL[name], mixed_layouts(tiny.ALL[name], flipped))
    with pytest.raises(CheckpointError, match=r"layers\.0\..*hub layout.*layers\.3\..*v5 layout"):
        HFWeights(tmp_path)


def test_experts_that_fit_neither_layout_are_refused_with_both_shapes(tmp_path: Path) -> None:
    key = EXPERTS.format(0, "gate_up_proj")
    tensors = random_hf_tensors(tiny.TINY) | {key: np.zeros((8, 64, 50), np.float32)}
    write_hf_checkpoint(tmp_path, tiny.TINY, tensors)
    with pytest.raises(CheckpointError, match=r"has shape \[8, 64, 50\], expected \[8, 64, 48\] \(hub layout\) or \[8, 48, 64\]"):
        HFWeights(tmp_path)


def test_a_slice_touches_only_the_tensors_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = variant(tiny.UNIFORM)
    weights = HFWeights(write_hf_checkpoint(tmp_path, config, random_hf_tensors(config, layout="v5")))
    path = "model/language_model/layers/mlp/experts/gate_up_proj"
    whole = weights.read(path)
    touched = []
    array = weights.files.array
    monkeypatch.setattr(weights.files, "array", lambda key: touched.append(key) or array(key))
    index = (slice(1, 2), slice(2, 5), slice(None), slice(1, 2), slice(3, 20))
    part = weights.read(path, index)
    np.testing.assert_array_equal(part, whole[index])
    assert touched == [EXPERTS.format(1, "gate_up_proj")]
