"""Every spelling of `config.json` in circulation gives one configuration; what cannot be computed is refused by key."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.verify import verify
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import ConfigError
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.tiny import ConfigDict, variant


@pytest.fixture(params=tiny.ALL)
def hub(request) -> ConfigDict:
    return tiny.ALL[request.param]


def without(config: ConfigDict, section: str, *keys: str) -> ConfigDict:
    out = copy.deepcopy(config)
    for key in keys:
        del (out[section] if section else out)[key]
    return out


def as_v5(config: ConfigDict) -> ConfigDict:
    """What transformers 5.x writes after reading `config`."""
    transformers = pytest.importorskip("transformers")
    cls = transformers.Qwen3VLMoeConfig if config["model_type"] == "qwen3_vl_moe" else transformers.Qwen3VLConfig
    return json.loads(cls.from_dict(copy.deepcopy(config)).to_json_string())


def test_v5_spelling_gives_the_same_config(hub):
    v5 = as_v5(hub)
    assert v5["text_config"].keys() & {"rope_parameters", "num_local_experts"}, "transformers no longer writes the 5.x spelling"
    assert Qwen3VLMoeConfig.from_hf(v5) == Qwen3VLMoeConfig.from_hf(hub)


def test_early_spellings_give_the_same_config(hub):
    early = copy.deepcopy(hub)
    early["text_config"]["rope_scaling"]["type"] = early["text_config"]["rope_scaling"].pop("rope_type")
    early["text_config"] |= {"use_cache": True, "pad_token_id": None, "dtype": "bfloat16", "tie_word_embeddings": True}
    assert Qwen3VLMoeConfig.from_hf(early) == Qwen3VLMoeConfig.from_hf(hub)


@pytest.mark.parametrize("norm_topk_prob", [True, False, None])
def test_norm_topk_prob_is_ignored_as_transformers_does(norm_topk_prob):
    base = without(tiny.TINY, "text_config", "norm_topk_prob")
    if norm_topk_prob is not None:
        base["text_config"]["norm_topk_prob"] = norm_topk_prob
    assert Qwen3VLMoeConfig.from_hf(base) == Qwen3VLMoeConfig.from_hf(tiny.TINY)


def test_both_names_of_the_number_of_experts():
    local = without(tiny.TINY, "text_config", "num_experts")
    local["text_config"]["num_local_experts"] = 8
    both = variant(tiny.TINY, text_config={"num_local_experts": 8})
    assert Qwen3VLMoeConfig.from_hf(local) == Qwen3VLMoeConfig.from_hf(both) == Qwen3VLMoeConfig.from_hf(tiny.TINY)
    both["text_config"]["num_local_experts"] = 9
    with pytest.raises(ConfigError, match="num_experts = 8.*num_local_experts = 9"):
        Qwen3VLMoeConfig.from_hf(both)


@pytest.mark.parametrize(("version", "theta"), [("4.57.0.dev0", 5e6), ("5.23.0", 5e5), (None, 5e5)])
def test_missing_rope_theta_means_the_writers_default(version, theta):
    config = without(tiny.TINY, "text_config", "rope_theta") | {"transformers_version": version}
    assert Qwen3VLMoeConfig.from_hf(config).text_config.rope_theta == theta


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("nested", [True, False])
def test_only_the_top_level_tie_counts(top, nested):
    config = variant(tiny.TINY, text_config={"tie_word_embeddings": nested}, tie_word_embeddings=top)
    assert Qwen3VLMoeConfig.from_hf(config).tie_word_embeddings is bool(top)


def test_vision_rope_parameters_of_5_24():
    axial = variant(tiny.TINY, vision_config={"rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}})
    assert Qwen3VLMoeConfig.from_hf(axial) == Qwen3VLMoeConfig.from_hf(tiny.TINY)
    axial["vision_config"]["rope_parameters"]["rope_theta"] = 2e4
    assert Qwen3VLMoeConfig.from_hf(axial).vision_config.rope_theta == 2e4


@pytest.mark.parametrize(
    "kind", ["qwen3_vl_moe", "qwen3_vl_moe_vision", "qwen3_vl", "qwen3_vl_vision"]
)  # fmt: skip
def test_vision_model_types(kind):
    config = variant(tiny.TINY, vision_config={"model_type": kind})
    assert Qwen3VLMoeConfig.from_hf(config) == Qwen3VLMoeConfig.from_hf(tiny.TINY)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2_vl"}, "model_type.*qwen2_vl"),
        ({"model_type": None}, "model_type"),
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": []}, "text_config is list"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"image_token_id": 256}, "image_token_id = 256.*< 256"),
        ({"video_token_id": 250}, "image_token_id and video_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*'yes'"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act"),
        ({"text_config": {"attention_bias": True}}, "text_config.attention_bias"),
        ({"text_config": {"attention_dropout": 0.1}}, "text_config.attention_dropout"),
        ({"text_config": {"hidden_size": "64"}}, "text_config.hidden_size is '64', expected int"),
        ({"text_config": {"hidden_size": 64.5}}, "text_config.hidden_size is 64.5, expected int"),
        ({"text_config": {"hidden_size": None}}, "text_config.hidden_size is missing"),
        ({"text_config": {"hidden_size": True}}, "text_config.hidden_size is True, expected int"),
        ({"text_config": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers is 0, expected int >= 1"),
        ({"text_config": {"num_attention_heads": 5}}, "num_attention_heads = 5.*num_key_value_heads = 2"),
        ({"text_config": {"head_dim": 33}}, "text_config.head_dim is 33, expected an even"),
        ({"text_config": {"num_experts_per_tok": 9}}, "num_experts_per_tok = 9.*num_experts = 8"),
        ({"text_config": {"mlp_only_layers": 3}}, "text_config.mlp_only_layers is 3"),
        ({"text_config": {"decoder_sparse_step": 0}}, "text_config.decoder_sparse_step is 0"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "text_config.rms_norm_eps is nan"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn"}}}, "rope_type = 'yarn'"),
        ({"text_config": {"rope_scaling": {"mrope_interleaved": False}}}, "mrope_interleaved"),
        ({"text_config": {"rope_scaling": {"mrope_section": [16, 16]}}}, "mrope_section"),
        ({"text_config": {"rope_parameters": {"rope_theta": 1e4}}}, "rope_theta.*contradicts"),
        ({"text_config": {"rope_scaling": 3}}, "rope_scaling is 3"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"out_hidden_size": 63}}, "out_hidden_size = 63.*hidden_size = 64"),
        ({"vision_config": {"num_heads": 5}}, "vision_config.hidden_size = 48 over num_heads = 5"),
        ({"vision_config": {"num_heads": 24}}, "vision_config.hidden_size = 48 over num_heads = 24"),
        ({"vision_config": {"deepstack_visual_indexes": [0, 5]}}, r"deepstack_visual_indexes = \[0, 5\].*depth = 5"),
        ({"vision_config": {"deepstack_visual_indexes": [1, 1]}}, r"deepstack_visual_indexes = \[1, 1\]"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "vision_config rope_type = 'yarn'"),
    ],
)
def test_refusals_name_the_key_and_what_was_expected(change, named):
    with pytest.raises(ConfigError, match=named) as error:
        Qwen3VLMoeConfig.from_hf(variant(tiny.TINY, **change))
    assert "\n" not in str(error.value)


def test_to_hf_round_trip(hub):
    config = Qwen3VLMoeConfig.from_hf(hub)
    written = json.loads(json.dumps(config.to_hf()))
    assert Qwen3VLMoeConfig.from_hf(written) == config
    assert Qwen3VLMoeConfig.from_hf(written).to_hf() == config.to_hf()


def test_a_moe_model_without_experts_stays_one():
    config = Qwen3VLMoeConfig.from_hf(variant(tiny.TINY, text_config={"num_experts": 0}))
    assert Qwen3VLMoeConfig.from_hf(config.to_hf()) == config


def test_to_hf_keeps_what_the_network_does_not_use():
    extra = variant(tiny.TINY, text_config={"eos_token_id": 7}, vision_config={"dtype": "bfloat16"}, my_note={"a": [1]})
    written = Qwen3VLMoeConfig.from_hf(extra).to_hf()
    assert written["my_note"] == {"a": [1]}
    assert written["text_config"]["eos_token_id"] == 7
    assert written["vision_config"]["dtype"] == "bfloat16"


def test_to_hf_is_the_hub_spelling(hub):
    """The keys other readers of hub files look for, and every value as the hub would have it."""
    written = Qwen3VLMoeConfig.from_hf(hub).to_hf()
    text = written["text_config"]
    for key, value in hub["text_config"].items():
        assert text[key] == value, key
    assert "rope_parameters" not in text
    assert "num_local_experts" not in text
    for key, value in hub["vision_config"].items():
        assert written["vision_config"][key] == value, key


def _fields(hf_config: Any) -> dict[str, Any]:
    """The facts of transformers' own configuration object, under our names."""
    text, vision = hf_config.text_config, hf_config.vision_config
    moe = hf_config.model_type == "qwen3_vl_moe"
    names = [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "max_position_embeddings",
    ] + ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "router_aux_loss_coef",
         "output_router_logits"] * moe  # fmt: skip
    tower = [
        "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size", "temporal_patch_size",
        "spatial_merge_size", "in_channels", "num_position_embeddings",
    ]  # fmt: skip
    return {
        **{f"text.{n}": getattr(text, n) for n in names},
        **{f"vision.{n}": getattr(vision, n) for n in tower},
        "text.rope_theta": text.rope_parameters["rope_theta"],
        "text.mrope_section": tuple(text.rope_parameters["mrope_section"]),
        "text.mlp_only_layers": tuple(text.mlp_only_layers) if moe else (),
        "vision.rope_theta": vision.rope_parameters["rope_theta"],
        "vision.deepstack_visual_indexes": tuple(vision.deepstack_visual_indexes),
        **{n: getattr(hf_config, n) for n in ("image_token_id", "video_token_id", "tie_word_embeddings")},
    }


def _ours(config: Qwen3VLMoeConfig, names: list[str]) -> dict[str, Any]:
    sections = {"text": config.text_config, "vision": config.vision_config}
    return {n: getattr(sections[n.split(".")[0]], n.split(".")[1]) if "." in n else getattr(config, n) for n in names}


@pytest.mark.parametrize("written_by", ["hub", "v5", "us"])
def test_agrees_with_transformers_reading(hub, written_by, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"hub": lambda: hub, "v5": lambda: as_v5(hub), "us": lambda: Qwen3VLMoeConfig.from_hf(hub).to_hf()}[written_by]()
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = _fields(transformers.AutoConfig.from_pretrained(tmp_path))
    assert _ours(Qwen3VLMoeConfig.from_json(tmp_path), list(theirs)) == theirs


@pytest.mark.parametrize("base", [tiny.TINY, tiny.DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize(
    ("section", "key"),
    [("text_config", "head_dim"), ("text_config", "num_key_value_heads"), ("text_config", "rms_norm_eps"),
     ("vision_config", "in_channels"), ("vision_config", "deepstack_visual_indexes"), ("", "tie_word_embeddings"),
     ("", "image_token_id")],
)  # fmt: skip
def test_a_missing_key_means_what_transformers_takes_it_for_or_is_refused(base, section, key, tmp_path):
    """A default is part of the format: one that differs would load the same file as another model."""
    transformers = pytest.importorskip("transformers")
    config = without(base, section, key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = _fields(transformers.AutoConfig.from_pretrained(tmp_path))
    try:
        ours = Qwen3VLMoeConfig.from_json(tmp_path)
    except ConfigError as error:
        assert key in str(error)
    else:
        assert _ours(ours, list(theirs)) == theirs


@given(st.data())
def test_layer_kinds_follow_transformers_rule(data):
    """MOE 303: MoE iff the layer is not in mlp_only_layers and (i + 1) % decoder_sparse_step == 0."""
    layers = data.draw(st.integers(1, 12))
    dense = data.draw(st.lists(st.integers(0, layers + 2), max_size=6))
    step = data.draw(st.integers(1, 5))
    config = variant(tiny.TINY, text_config={"num_hidden_layers": layers, "mlp_only_layers": dense, "decoder_sparse_step": step})
    kinds = Qwen3VLMoeConfig.from_hf(config).text_config.layer_kinds()
    assert kinds == tuple("moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(layers))


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "null"])
def test_a_broken_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Qwen3VLMoeConfig.from_json(tmp_path)
    with pytest.raises(ConfigError, match="not found"):
        Qwen3VLMoeConfig.from_json(tmp_path / "elsewhere")


def test_what_a_file_holds_is_refused_with_the_files_name(tmp_path: Path) -> None:
    """`verify` reads the config.json of two directories."""
    for name, change in (("good", {}), ("bad", {"vision_config": None})):
        write_hf_checkpoint(tmp_path / name, tiny.TINY | change, random_hf_tensors(tiny.TINY))
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path / 'bad' / 'config.json'))}: vision_config is missing"):
        verify(tmp_path / "good", tmp_path / "bad")
