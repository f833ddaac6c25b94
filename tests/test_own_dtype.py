"""A model has one dtype, whatever its files hold; and what `save_pretrained` writes is the model that was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.generation_config import GenerationConfig
from qvlmoe_jax.param_tree import flatten
from tests import cases, ours, tiny
from tests.fp8_checkpoints import fp8_config, quantise
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


def in_float32(tensors: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {key: a.astype(np.float32) if part in key else a for key, a in tensors.items()}


def checkpoint(directory: Path, kind: str, config: dict[str, Any]) -> Path:
    tensors = random_hf_tensors(config, dtype=BF16)
    if kind == "float8":
        return write_hf_checkpoint(directory, fp8_config(config, (16, 16)), quantise(tensors, (16, 16)))
    return write_hf_checkpoint(directory, config, in_float32(tensors, kind))


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
@pytest.mark.parametrize("kind", ["float8", "norm", "layers.1.", "q_proj", "mlp.experts", "embed_tokens"])
def test_files_of_several_dtypes_run_in_one(kind: str, named: bool, tmp_path: Path) -> None:
    """The one that config.json names; without that, the one that most have."""
    config = {key: value for key, value in tiny.TINY.items() if key not in ("dtype", "torch_dtype")}
    config["text_config"] = {key: v for key, v in config["text_config"].items() if key not in ("dtype", "torch_dtype")}
    if named:
        config["dtype"] = "bfloat16"
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint(tmp_path / "hf", kind, config))
    dtypes = {leaf.dtype for leaf in flatten(model.params()).values()}
    assert len(dtypes) == 1
    if named:
        assert dtypes == {BF16}
    batch = ours.make_batch(config, cases.CASES["image"](config))
    assert bool(jnp.all(jnp.isfinite(jax.jit(lambda m, b: m(b).logits)(model, batch))))


def test_one_dtype_is_kept_whatever_the_config_names(tmp_path: Path) -> None:
    config = tiny.variant(tiny.TINY, dtype="bfloat16")
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint(tmp_path / "hf", ".", config))
    assert {leaf.dtype for leaf in flatten(model.params()).values()} == {np.dtype(np.float32)}


def test_stop_tokens_and_sampling_survive_saving(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", "float32", tiny.TINY)
    stated = {"eos_token_id": [5, 7], "pad_token_id": 3, "do_sample": True, "top_k": 20, "temperature": 0.7, "note": "kept"}
    (source / "generation_config.json").write_text(json.dumps(stated))
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(source)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == stated
    again = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "saved").generation_config
    assert (again.eos_token_id, again.pad_token_id) == ((5, 7), 3)
    assert again.sampling == model.generation_config.sampling


def test_a_generation_config_made_by_hand_is_written_as_a_file_says_it(tmp_path: Path) -> None:
    made = GenerationConfig((4,), 2, {"temperature": 0.5, "top_p": 0.9})
    (tmp_path / "generation_config.json").write_text(json.dumps(made.to_hf()))
    read = GenerationConfig.from_directory(tmp_path)
    assert (read.eos_token_id, read.pad_token_id) == ((4,), 2)
    assert read.sampling == {**made.sampling, "top_k": 0}
    assert GenerationConfig().to_hf() == {}


@pytest.mark.parametrize("dtype", ["int8", np.int32, "bool", "complex64", "float8_e4m3fn", "bf16", [1]], ids=str)
def test_a_dtype_that_holds_no_weights_is_refused(dtype: Any, tmp_path: Path) -> None:
    directory = write_hf_checkpoint(tmp_path / "hf", tiny.TINY, random_hf_tensors(tiny.TINY))
    with pytest.raises(ConfigError, match="dtype = .*, expected float32, bfloat16 or float16"):
        Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    with pytest.raises(ConfigError, match="dtype = .*, expected float32"):
        Qwen3VLMoeForConditionalGeneration.from_config(tiny.TINY, nnx.Rngs(0), dtype=dtype)
