"""Damaged, lying and contradicting checkpoints: one line names the file or key and what was expected; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from qvlmoe_jax.checkpoint import open_weights
from qvlmoe_jax.errors import QvlmoeError
from tests import tiny
from tests.bad_files import CASES, NORM, Damage, case
from tests.hf_checkpoints import random_hf_tensors, snapshot, write_hf_checkpoint
from tests.tiny import ConfigDict, variant

DOWN = "model.language_model.layers.0.mlp.experts.down_proj"


# --- tensors against the config ----------------------------------------------------------------------------------------


def tensors(name: str, edit: Callable[[dict[str, np.ndarray]], Any], *expected: str, config: ConfigDict = tiny.TINY) -> None:
    @case(name, *expected)
    def _(source: Path) -> None:
        changed = random_hf_tensors(config)
        edit(changed)
        shutil.rmtree(source)
        write_hf_checkpoint(source, config, changed, shards=2)


tensors("missing key", lambda t: t.pop(NORM), "1 of 145 expected tensors missing", NORM)
tensors("unknown key", lambda t: t.update(extra=np.ones(3)), "1 unknown tensors: 'extra'", "expected only those")
tensors("renamed key", lambda t: t.update(norm=t.pop(NORM)), "missing", NORM, "found instead 'norm'")
tensors("wrong shape", lambda t: t.update({NORM: np.ones(63, np.float32)}), NORM, "has shape [63], expected [64]")
tensors("wrong rank", lambda t: t.update({NORM: np.ones((64, 1), np.float32)}), NORM, "has shape [64, 1], expected [64]")
tensors("integer weights", lambda t: t.update({NORM: np.ones(64, np.int8)}), NORM, "has dtype I8, expected one of BF16, F16, F32")
tensors(
    "fp8 weights",
    lambda t: t.update({DOWN: t[DOWN].astype(ml_dtypes.float8_e4m3fn)}),
    DOWN,
    "is F8_E4M3, but config.json has no quantization_config",
)
tensors("layouts that contradict", lambda t: t.update({DOWN: t[DOWN].swapaxes(1, 2)}), DOWN, "hub layout", "expected one layout")
tensors("experts of no layout", lambda t: t.update({DOWN: t[DOWN][:, :, 1:]}), DOWN, "[8, 24, 63], expected [8, 24, 64] (hub")
tensors(
    "tied model with another head",
    lambda t: t.update({"lm_head.weight": np.zeros((256, 64), np.float32)}),
    "'lm_head.weight' differs from 'model.language_model.embed_tokens.weight'",
    "expected the same bytes",
    config=tiny.TIED,
)
tensors("head missing from an untied model", lambda t: t.pop("lm_head.weight"), "missing", "'lm_head.weight'")
tensors(
    "a name with a line break", lambda t: t.update({"two\nlines": np.ones(3, np.float32)}), r"'two\nlines'", "expected only those"
)


# --- the config --------------------------------------------------------------------------------------------------------


def config(name: str, changes: ConfigDict | str, *expected: str) -> None:
    @case(name, *expected)
    def _(source: Path) -> None:
        text = changes if isinstance(changes, str) else json.dumps(variant(tiny.TINY, **changes))
        (source / "config.json").write_text(text)


@case("missing config.json", "config.json: not found", "expected")
def _(source: Path) -> None:
    (source / "config.json").unlink()


@case("config.json is a link out of the directory", "config.json", "outside the directory", "expected a file inside it")
def _(source: Path) -> None:
    shutil.move(source / "config.json", source.parent / "config.json")
    (source / "config.json").symlink_to("../config.json")


config("config not JSON", '{"model_type": ', "not valid JSON")
config("config a list", "[]", "expected an object")
config("config nested too deep", "[" * 200_000, "not valid JSON")
config("config with an endless number", '{"model_type": ' + "9" * 5000 + "}", "not valid JSON")
config("unknown model_type", {"model_type": "llama"}, "model_type is 'llama', expected 'qwen3_vl_moe'")
config("text_config missing", {"text_config": None}, "text_config is missing, expected an object")
config("quantised otherwise", {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq', expected 'fp8'")
config("fp8 without blocks", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None, expected two")
config("widths that contradict", {"vision_config": {"out_hidden_size": 72}}, "out_hidden_size = 72 contradicts", "size = 64")
config("two numbers of experts", {"text_config": {"num_local_experts": 9}}, "num_experts = 8 contradicts", "_experts = 9")
config(
    "two rotary bases",
    {"text_config": {"rope_parameters": {"rope_theta": 1e4}}},
    "rope_theta = 5000000.0 contradicts",
    "10000.0",
)
config("heads that do not group", {"text_config": {"num_key_value_heads": 3}}, "num_attention_heads = 4", "_value_heads = 3")
config("more layers than there are", {"text_config": {"num_hidden_layers": 6}}, "11 of 156 expected tensors missing", "layers.5.")
config("fewer layers than there are", {"text_config": {"num_hidden_layers": 4}}, "11 unknown tensors", "layers.4.")
config("another width", {"text_config": {"moe_intermediate_size": 25}}, "[8, 64, 48], expected [8, 64, 50]", "gate_up_proj")


# --- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("good") / "hf", tiny.TINY, random_hf_tensors(tiny.TINY), shards=3)


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize(("damage", "expected"), CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    damage: Damage, expected: tuple[str, ...], good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(good, source)
    existing = tmp_path / "existing"
    (existing / "checkpoint").mkdir(parents=True)
    (existing / "checkpoint" / "weights").write_bytes(b"old")
    (existing / "conversion.json").write_text("{}")
    damage(source)
    before = snapshot(tmp_path), sorted(tmp_path.iterdir())

    assert main(["hf2jax", str(source), str(tmp_path / "new")]) == 2
    line = the_line(capsys)
    for part in expected:
        assert part in line
    assert main(["hf2jax", str(source), str(existing), "--overwrite"]) == 2
    assert the_line(capsys) == line
    assert (snapshot(tmp_path), sorted(tmp_path.iterdir())) == before
    with pytest.raises(QvlmoeError):
        open_weights(source)


def test_the_undamaged_checkpoint_opens(good: Path) -> None:
    """So that the refusals above are due to the damage."""
    assert open_weights(good).config.model_type == "qwen3_vl_moe"


def test_a_side_file_that_links_out_of_the_directory_is_not_copied(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(good, tmp_path / "hf")
    (tmp_path / "id_rsa").write_text("secret")
    (source / "tokenizer.json").symlink_to("../id_rsa")
    assert main(["hf2jax", str(source), str(tmp_path / "new")]) == 2
    assert "tokenizer.json" in the_line(capsys)
    assert not (tmp_path / "new").exists()
