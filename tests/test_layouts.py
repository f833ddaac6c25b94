"""One model in every spelling a checkpoint may have gives the same parameters, and any slice is the whole's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.__main__ import main
from qvlmoe_jax.checkpoint import load_params, open_weights
from qvlmoe_jax.hf_weights import HFWeights
from tests import tiny
from tests.fp8_checkpoints import fp8_config, quantise
from tests.hf_checkpoints import random_hf_tensors, read_raw, split_experts, write_hf_checkpoint
from tests.test_convert import assert_same_bits, expected_params

BF16 = np.dtype(ml_dtypes.bfloat16)
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
Arrays = dict[str, np.ndarray]
Captured = pytest.CaptureFixture[str]


def v5(tensors: Arrays) -> Arrays:
    return {key: t.swapaxes(1, 2) if ".mlp.experts." in key else t for key, t in tensors.items()}


def without_model(tensors: Arrays) -> Arrays:
    """As `Qwen3VLMoeModel.save_pretrained` names them: the model inside, without its head."""
    return {key.removeprefix("model."): t for key, t in tensors.items()}


def some_without_model(tensors: Arrays) -> Arrays:
    """The vision tower under its own prefix alone."""
    return {key.removeprefix("model.") if ".visual." in key else key: t for key, t in tensors.items()}


def with_head(tensors: Arrays) -> Arrays:
    return tensors | {HEAD: tensors[EMBEDDING]}


def both(*changes: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
    return lambda tensors: functools.reduce(lambda t, change: change(t), changes, tensors)


SPELLINGS = [
    pytest.param("mixed", v5, id="5.x"),
    pytest.param("mixed", split_experts, id="per expert"),
    pytest.param("other", split_experts, id="per expert, uniform"),
    pytest.param("square_2i", split_experts, id="per expert, square"),
    pytest.param("tied", without_model, id="base model"),
    pytest.param("tied", both(split_experts, without_model), id="base model, per expert"),
    pytest.param("dense_tied", without_model, id="base model, dense"),
    pytest.param("other", some_without_model, id="visual apart"),
    pytest.param("tied", with_head, id="duplicate head"),
    pytest.param("dense_tied", both(with_head, without_model), id="base model, duplicate head"),
]


@pytest.mark.parametrize(("name", "change"), SPELLINGS)
def test_every_spelling_is_the_same_model(name: str, change: Callable[[Arrays], Arrays], tmp_path: Path) -> None:
    config, tensors = tiny.ALL[name], random_hf_tensors(tiny.ALL[name], dtype=BF16)
    changed = change(tensors)
    assert changed.keys() != tensors.keys() or any(changed[key].shape != tensors[key].shape for key in tensors)
    source = write_hf_checkpoint(tmp_path / "hf", config, changed, shards=2)
    expected = expected_params(config, tensors)
    assert_same_bits(load_params(open_weights(source)), expected)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    assert_same_bits(load_params(open_weights(tmp_path / "jax")), expected)
    assert main(["verify", str(source), str(tmp_path / "jax")]) == 0
    # and back: the hub's names and orientation, whatever came
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    assert_same_file(tmp_path / "back", tensors if HEAD in tensors or HEAD not in changed else with_head(tensors))


def assert_same_file(directory: Path, expected: Arrays) -> None:
    header, data = read_raw(directory / "model.safetensors")
    assert header.keys() - {"__metadata__"} == expected.keys()
    for key, tensor in expected.items():
        begin, end = header[key]["data_offsets"]
        assert header[key]["shape"] == list(tensor.shape), key
        assert data[begin:end] == tensor.tobytes(), key


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("model.language_model.", "text decoder (Qwen3VLMoeTextModel)"), ("model.visual.", "vision tower (Qwen3VLMoeVisionModel)")],
)
@pytest.mark.parametrize("keep_name", [False, True])
def test_a_part_of_the_model_is_refused(prefix: str, part: str, keep_name: bool, tmp_path: Path, capsys: Captured) -> None:
    """Saved by itself it has no prefix at all; saved with its name, the other part is missing."""
    tensors = random_hf_tensors(tiny.TINY)
    kept = {key if keep_name else key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    source = write_hf_checkpoint(tmp_path / "hf", tiny.TINY, kept)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert ("expected tensors missing" if keep_name else f"holds a {part} alone") in err
    assert not (tmp_path / "jax").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t | {EMBEDDING.removeprefix("model."): t[EMBEDDING]}, "are the same one, expected one of them"),
        (lambda t: t | random_fused(t), "unknown tensors: 'model.language_model.layers.0.mlp.experts.down_proj'"),
        (
            lambda t: {k: v for k, v in t.items() if ".0.mlp.experts.7.up_proj" not in k},
            "expected tensors missing: 'model.language_model.layers.0.mlp.experts.7.up_proj.weight'",
        ),
        (lambda t: t | {"model.language_model.layers.0.mlp.experts.8.up_proj.weight": np.ones((24, 64), BF16)}, "1 unknown tens"),
        (lambda t: t | {"model.language_model.layers.0.mlp.experts.3.up_proj.weight": np.ones((64, 24), BF16)}, "expected [24, "),
    ],
    ids=["two names", "both layouts", "an expert's linear missing", "an expert too many", "turned"],
)
def test_per_expert_tensors_that_do_not_add_up(
    change: Callable[[Arrays], Arrays], expected: str, tmp_path: Path, capsys: Captured
) -> None:
    tensors = change(split_experts(random_hf_tensors(tiny.TINY, dtype=BF16)))
    source = write_hf_checkpoint(tmp_path / "hf", tiny.TINY, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert expected in err


def random_fused(tensors: Arrays) -> Arrays:
    return {
        key: t for key, t in random_hf_tensors(tiny.TINY, dtype=BF16).items() if ".mlp.experts." in key and key not in tensors
    }


@functools.cache
def opened(directory: Path, layout: str) -> tuple[HFWeights, Arrays]:
    """A checkpoint in one layout, and its whole parameters."""
    tensors, config = random_hf_tensors(tiny.MIXED, dtype=BF16), tiny.MIXED
    if layout == "fp8":
        tensors, config = quantise(tensors, (7, 40)), fp8_config(config, (7, 40))
    elif layout != "hub":
        tensors = {"v5": v5, "per expert": split_experts}[layout](tensors)
    weights = HFWeights(write_hf_checkpoint(directory / layout, config, tensors, shards=2))
    return weights, {path: weights.read(path) for path in weights.shapes}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slices")


def slices(size: int) -> st.SearchStrategy[slice]:
    """Of step 1; empty ones, open ends and ends past the array included."""
    end = st.none() | st.integers(0, size + 1)
    return st.builds(slice, end, end) | st.builds(
        lambda start, length: slice(start, start + length), st.integers(0, size), st.integers(0, size)
    )


@pytest.mark.parametrize("layout", ["hub", "v5", "per expert", "fp8"])
@settings(max_examples=150)
@given(data=st.data())
def test_a_slice_is_the_wholes(layout: str, place: Path, data: st.DataObject) -> None:
    weights, whole = opened(place, layout)
    path = data.draw(st.sampled_from([*whole, *[p for p in whole if "experts" in p or "layers" in p] * 2]))
    index = tuple(data.draw(slices(size)) for size in whole[path].shape)
    dtype = data.draw(st.sampled_from([None, BF16, np.dtype(np.float32)]))
    copy = data.draw(st.booleans())
    expected = whole[path][index]
    expected = expected if dtype is None else expected.astype(dtype)
    found = weights.read(path, index, dtype, copy=copy)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()
