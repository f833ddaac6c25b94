"""Float8 checkpoints: every number is the formula's in float64, rounded, in any layout and with any blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.checkpoint import load_params, open_weights
from qvlmoe_jax.errors import QvlmoeError
from tests import tiny
from tests.fp8_checkpoints import FP8, Arrays, by_formula, fp8_config, quantise
from tests.hf_checkpoints import random_hf_tensors, split_experts, write_hf_checkpoint
from tests.test_convert import assert_same_bits, expected_params

BF16 = np.dtype(ml_dtypes.bfloat16)
Captured = pytest.CaptureFixture[str]
EXPERT = "model.language_model.layers.0.mlp.experts.down_proj"
LINEAR = "model.language_model.layers.2.self_attn.k_proj.weight"

SIXTEEN, RELEASED, ODD = (16, 16), (128, 128), (7, 40)


def write(directory: Path, config: tiny.ConfigDict, block: tuple[int, int], layout: str = "hub") -> tuple[Path, Arrays, Arrays]:
    """The directory; its tensors; and the same model in float32 and the hub's layout."""
    plain = random_hf_tensors(config, dtype=BF16)
    if layout == "per_expert":
        split = quantise(split_experts(plain), block)
        values = by_formula(split, block, np.float32)
        return write_hf_checkpoint(directory / "hf", fp8_config(config, block), split, shards=3), split, fuse(values)
    tensors = quantise(plain, block)
    values = by_formula(tensors, block, np.float32)
    if layout == "v5":
        tensors = {key: t.swapaxes(1, 2) if ".mlp.experts." in key else t for key, t in tensors.items()}
    return write_hf_checkpoint(directory / "hf", fp8_config(config, block), tensors, shards=2), tensors, values


def fuse(tensors: Arrays) -> Arrays:
    """The inverse of `split_experts`."""
    out, experts = {}, {}
    for key, tensor in tensors.items():
        base, fused, rest = key.partition(".mlp.experts.")
        if fused:
            number, name = rest.split(".")[:2]
            experts.setdefault(base, {}).setdefault(name, {})[int(number)] = tensor.T
        else:
            out[key] = tensor
    for base, kinds in experts.items():
        gate, up, down = (np.stack([kinds[f"{n}_proj"][e] for e in range(len(kinds["up_proj"]))]) for n in ("gate", "up", "down"))
        out[f"{base}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=2)
        out[f"{base}.mlp.experts.down_proj"] = down
    return out


def test_splitting_the_experts_can_be_undone() -> None:
    tensors = random_hf_tensors(tiny.TINY)
    again = fuse(split_experts(tensors))
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("name", "layout", "block", "dtype"),
    [
        ("tiny", "hub", SIXTEEN, "bfloat16"),
        ("tiny", "hub", SIXTEEN, "float32"),
        ("tiny", "hub", RELEASED, "bfloat16"),
        ("other", "hub", ODD, "float32"),
        ("mixed", "per_expert", SIXTEEN, "bfloat16"),
        ("other", "per_expert", ODD, "float32"),
        ("square_i", "v5", SIXTEEN, "bfloat16"),
        ("dense_tied", "hub", ODD, "bfloat16"),
    ],
)
def test_every_number_is_the_formulas(name: str, layout: str, block: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    config, target = tiny.ALL[name], np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    source, tensors, values = write(tmp_path, config, block, layout)
    assert sum(tensor.dtype == FP8 for tensor in tensors.values()) > 20
    expected = {path: array.astype(target) for path, array in expected_params(config, values).items()}
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dtype", dtype]) == 0
    assert_same_bits(load_params(open_weights(tmp_path / "jax")), expected)
    assert_same_bits(Qwen3VLMoeForConditionalGeneration.from_pretrained(source, dtype=target).params(), expected)
    assert main(["verify", str(source), str(tmp_path / "jax")]) == 0


def test_half_precision_scales_and_every_float8_number(tmp_path: Path) -> None:
    block = (16, 16)
    tensors = quantise(random_hf_tensors(tiny.TINY, dtype=BF16), block, scale_dtype=BF16)
    finite = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])  # these two are NaN
    tensors[LINEAR] = np.resize(finite, tensors[LINEAR].shape).view(FP8)
    source = write_hf_checkpoint(tmp_path / "hf", fp8_config(tiny.TINY, block), tensors)
    expected = expected_params(tiny.TINY, by_formula(tensors, block, BF16))
    assert_same_bits(load_params(open_weights(source), dtype=BF16), expected)


@pytest.mark.parametrize("flags", [[], ["--dtype", "keep"]])
def test_keeping_float8_is_refused(flags: list[str], tmp_path: Path, capsys: Captured) -> None:
    source, *_ = write(tmp_path, tiny.TINY, SIXTEEN)
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "expected --dtype bfloat16 or float32 instead of keep" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_scales_that_were_not_recorded_are_a_difference(tmp_path: Path, capsys: Captured) -> None:
    source, *_ = write(tmp_path, tiny.TINY, SIXTEEN)
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dtype", "bfloat16"]) == 0
    record = tmp_path / "jax" / "conversion.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"scales": {}}))
    capsys.readouterr()
    assert main(["verify", str(source), str(tmp_path / "jax")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "_scale_inv' has checksum" in err and "recorded None" in err


@pytest.mark.parametrize("name", ["tiny", "dense_tied"])
def test_the_way_back_is_a_plain_checkpoint(name: str, tmp_path: Path) -> None:
    """transformers loads it and finds the formula's numbers."""
    pytest.importorskip("torch")
    from tests import reference

    config = tiny.variant(tiny.ALL[name], dtype="float8_e4m3fn", text_config={"dtype": "float8_e4m3fn"})
    source, _, values = write(tmp_path, config, SIXTEEN)
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dtype", "bfloat16"]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == written["text_config"]["dtype"] == "bfloat16"
    model_class = reference.MODELS[config["model_type"]][1]
    model, report = model_class.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = model.state_dict()
    assert all(tensor.dtype == reference.torch.bfloat16 for tensor in found.values())
    expected = reference.state_dict({key: t.astype(BF16) for key, t in values.items()}, tied=config["tie_word_embeddings"])
    assert found.keys() == expected.keys()
    assert all(reference.torch.equal(found[key], expected[key]) for key in expected)


def _resize(tensors: Arrays, key: str, *shape: int) -> None:
    tensors[key] = np.resize(tensors[key], shape)


def _as_e5m2(tensors: Arrays) -> None:
    del tensors[f"{LINEAR}_scale_inv"]
    tensors[LINEAR] = tensors[LINEAR].view(ml_dtypes.float8_e5m2)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop(f"{LINEAR}_scale_inv"), f"'{LINEAR}' has no '{LINEAR}_scale_inv', expected its scales"),
        (lambda t: t.pop(f"{EXPERT}_scale_inv"), f"'{EXPERT}' has no '{EXPERT}_scale_inv', expected its scales"),
        (lambda t: _resize(t, f"{LINEAR}_scale_inv", 4, 5), f"'{LINEAR}_scale_inv' is F32 [4, 5], expected F32 [4, 4]"),
        (lambda t: _resize(t, f"{LINEAR}_scale_inv", 16), f"'{LINEAR}_scale_inv' is F32 [16], expected F32 [4, 4]"),
        (lambda t: _resize(t, f"{EXPERT}_scale_inv", 8, 1, 4), "is F32 [8, 1, 4], expected F32 [8, 2, 4]"),
        (lambda t: _resize(t, f"{EXPERT}_scale_inv", 1, 2, 4), "is F32 [1, 2, 4], expected F32 [8, 2, 4]"),
        (lambda t: t.update({f"{LINEAR}_scale_inv": np.ones((4, 4), np.int32)}), "is I32 [4, 4], expected F32 [4, 4]"),
        (lambda t: t.update({LINEAR: t[LINEAR].astype(BF16)}), f"1 unknown tensors: '{LINEAR}_scale_inv'"),
        (_as_e5m2, f"{LINEAR!r} has dtype F8_E5M2, expected one of BF16, F16, F32"),
        (lambda t: t.update({"model.language_model.norm.weight": np.ones(64, FP8)}), "has no"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    edit: Callable[[Arrays], Any], expected: str, tmp_path: Path, capsys: Captured
) -> None:
    tensors = quantise(random_hf_tensors(tiny.TINY, dtype=BF16), SIXTEEN)
    edit(tensors)
    source = write_hf_checkpoint(tmp_path / "hf", fp8_config(tiny.TINY, SIXTEEN), tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dtype", "float32"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert expected in err
    with pytest.raises(QvlmoeError):
        open_weights(source)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
