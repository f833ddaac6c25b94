"""Runs that train adapters: what their checkpoints hold, resuming, merged and adapter-only exports, the quantised base."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers

from convert.jax2hf import jax2hf
from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.adapters import adapt
from qvlmoe_jax.checkpoint import open_weights
from qvlmoe_jax.errors import CheckpointError, ConfigError
from qvlmoe_jax.lora import PARTS, linear_dims, linears
from qvlmoe_jax.orbax_store import OrbaxArrays
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.peft_format import load_adapter
from qvlmoe_jax.quantise import BLOCK, codes_of, dequantise, quantised_bytes, scales_of
from tests import cases, ours, reference, tiny, tolerances, training
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from train.__main__ import main
from train.checkpoints import fingerprint
from train.config import ScheduleConfig
from train.errors import TrainingError
from train.loop import open_model, train
from train.lora import Base, load_base
from train.optim import make_optimizer, schedule
from train.state import TrainState, all_params, init_state
from train.step import make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")
CONFIG = tiny.TINY
LORA = {"rank": 3, "alpha": 6, "targets": list(PARTS)}
KINDS: tuple[Any, ...] = ("int8", "nf4")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_weights(tmp_path_factory.mktemp("base") / "model", CONFIG)


def run(directory: Path, model: Path, *, steps: int = 4, **changes: Any) -> TrainState:
    settings: dict[str, Any] = {
        "lora": LORA,
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 2, "keep": 9, "export": True},
    }
    config = training.make_config(directory, model, **tiny.variant({"steps": steps, **settings}, **changes))
    return train(config, data=training.ListData(training.mixed_batches(CONFIG, 4)))


@pytest.fixture(scope="module", params=[None, pytest.param("nf4", marks=pytest.mark.soak)])
def finished(request: Any, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState, Any]:
    directory = tmp_path_factory.mktemp("lora") / "run"
    return directory, run(directory, model_directory, lora={"base_quantization": request.param}), request.param


def adapted_logits(finished: tuple[Path, TrainState, Any], inputs: cases.Inputs) -> np.ndarray:
    """Those of the model as it was trained: through the adapters."""
    directory, state, kind = finished
    weights: Any = open_weights(directory)
    abstract = Qwen3VLMoeForConditionalGeneration.abstract(weights.config)
    assert weights.lora.base_quantization == kind
    return ours.logits(adapt(abstract, weights.lora).with_params(all_params(state)), CONFIG, inputs)


def transformers_logits(directory: Path, inputs: cases.Inputs) -> np.ndarray:
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return reference.logits(model, inputs)


def test_only_adapters_are_trained_kept_and_have_optimizer_state(finished: tuple[Path, TrainState, Any]) -> None:
    directory, state, _ = finished
    adapters = flatten(state.params)
    assert adapters and all(path.endswith(("lora_A", "lora_B")) for path in adapters)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in adapters.values())
    stored = OrbaxArrays(directory / "checkpoints" / "4" / "state", prefix=("params",))
    assert {path: tuple(leaf.shape) for path, leaf in adapters.items()} == stored.shapes
    everything = OrbaxArrays(directory / "checkpoints" / "4" / "state")
    assert sum(map(math.prod, everything.shapes.values())) < 3.1 * sum(leaf.size for leaf in adapters.values())


def test_merged_exports_are_the_adapted_model_in_transformers(
    finished: tuple[Path, TrainState, Any], tmp_path: Path, record: Any
) -> None:
    directory, _, _ = finished
    inputs = cases.CASES["two_images"](CONFIG)
    expected, valid = adapted_logits(finished, inputs), cases.valid(inputs)
    jax2hf(directory, tmp_path / "jax2hf")
    assert main(["export", str(directory / "checkpoints" / "4"), str(tmp_path / "export")]) == 0
    for exported in (tmp_path / "jax2hf", tmp_path / "export", directory / "export"):
        error = np.abs(transformers_logits(exported, inputs) - expected)[valid].max()
        record("merged export's logits in transformers from the adapted model's", error)
        assert error <= tolerances.MODULE
    before = np.abs(transformers_logits(Path(open_weights(directory).base_path), inputs) - expected)[valid].max()  # pyright: ignore
    assert before > 0.5


def test_adapters_alone_are_exported_and_trained_on(
    finished: tuple[Path, TrainState, Any], model_directory: Path, tmp_path: Path
) -> None:
    directory, state, kind = finished
    assert main(["export", str(directory), str(tmp_path / "adapter"), "--adapter"]) == 0
    for exported in (tmp_path / "adapter", directory / "adapter"):
        lora, adapters = load_adapter(exported, open_weights(model_directory).config)
        assert (lora.rank, lora.alpha) == (3, 6)
        jax.tree.map(np.testing.assert_array_equal, adapters, jax.tree.map(np.asarray, state.params))
    changes: dict[str, Any] = {
        "lora": {"adapter": str(directory / "adapter"), "base_quantization": kind},
        "optimizer": {"learning_rate": 0.0},
    }
    on = run(tmp_path / "on", model_directory, steps=1, **changes)
    assert fingerprint(on.params) == fingerprint(state.params)
    with pytest.raises(ConfigError, match=r"lora.rank = 5, but .* has 3"):
        run(tmp_path / "other", model_directory, lora={**changes["lora"], "rank": 5})
    with pytest.raises(ConfigError, match="differ in"):
        run(tmp_path / "another", model_directory, lora={**changes["lora"], "targets": ["attention"]})


def test_a_resumed_run_ends_with_the_same_bits_and_another_base_is_refused(
    finished: tuple[Path, TrainState, Any], model_directory: Path, tmp_path: Path
) -> None:
    directory, state, kind = finished
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    again = run(copy, model_directory, lora={"base_quantization": kind})
    assert fingerprint(all_params(again)) == fingerprint(all_params(state))
    other = tmp_path / "other"
    shutil.copytree(model_directory, other)
    weights = other / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1  # one bit of the last number
    weights.write_bytes(raw)
    with pytest.raises(TrainingError, match="is not the base that") as error:
        run(copy, other, lora={"base_quantization": kind})
    assert "\n" not in str(error.value)
    record = copy / "lora.json"
    record.write_text(record.read_text().replace(str(model_directory), str(other)))
    with pytest.raises(CheckpointError, match="are not those this LoRA run was trained on"):
        jax2hf(copy, tmp_path / "hf")
    shutil.rmtree(other)
    with pytest.raises(CheckpointError, match="the base of this LoRA run is not at"):
        open_weights(copy)
    assert main(["export", str(model_directory), str(tmp_path / "none"), "--adapter"]) == 2


def independent(kind: str, w: np.ndarray, dims: tuple[int, int]) -> np.ndarray:
    """What quantising and expanding gives, one number at a time in float64, from the definitions."""
    quantiles = np.array(
        "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0 .0795803 .1609302 .2461123 .33791524 .4407098 "
        ".562617 .72295684 1".split(),
        np.float64,
    )
    first, last = w.ndim - sum(dims), w.ndim - dims[1]
    out = np.empty(w.shape)
    for at in np.ndindex(*w.shape[:first], *w.shape[last:]):
        index = (*at[:first], *(slice(None),) * dims[0], *at[first:])
        channel = w[index].astype(np.float64)
        if kind == "int8":
            step = np.abs(channel).max() / 127 or 1.0
            out[index] = np.round(channel / step) * step
            continue
        rows = channel.reshape(-1, channel.shape[-1])
        for row in rows:
            for start in range(0, len(row), BLOCK):
                block = row[start : start + BLOCK]
                scale = np.abs(block).max() or 1.0
                row[start : start + BLOCK] = [scale * quantiles[np.abs(quantiles - x / scale).argmin()] for x in block]
        out[index] = rows.reshape(channel.shape)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "dims"), [((2, 130, 3, 5), (1, 2)), ((3, 4, 24, 6), (2, 1)), ((2, 3, 7, 2, 4), (1, 2)), ((65, 9), (1, 1))]
)
def test_quantised_numbers_follow_their_definition(kind: Any, shape: tuple[int, ...], dims: tuple[int, int]) -> None:
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[..., 0] = 0  # a channel of zeros
    scales = scales_of(kind, w, dims)
    codes = codes_of(kind, w, scales, dims)
    found = dequantise(kind, codes, scales, dims, shape[len(shape) - dims[1] - 1])
    np.testing.assert_allclose(found, independent(kind, w, dims), rtol=2e-6, atol=1e-7)
    assert codes.nbytes + scales.nbytes == quantised_bytes(kind, shape, dims)


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantised_base_takes_the_bytes_computed(kind: Any, model_directory: Path, tmp_path: Path) -> None:
    settings = training.make_config(tmp_path / "run", model_directory, lora={**LORA, "base_quantization": kind})
    base = Base(settings)
    flat = flatten(load_base(settings, base.weights, None))
    shapes = linears(base.weights.config)
    held = sum(leaf.nbytes for path, leaf in flat.items() if path.endswith(("/codes", "/scales")))
    assert held == sum(quantised_bytes(kind, shape, linear_dims(path) or (0, 0)) for path, shape in shapes.items())
    others = sum(4 * math.prod(shape) for path, shape in base.weights.shapes.items() if path not in shapes)
    assert sum(leaf.nbytes for leaf in flat.values()) == held + others
    assert held < (0.3 if kind == "int8" else 0.18) * sum(4 * math.prod(shape) for shape in shapes.values())


@pytest.mark.slow
def test_the_quantised_base_is_never_whole(tmp_path: Path, record: Any) -> None:
    """Eight more layers: were their expanded weights held at once, or kept for the backward pass, temporaries would show it."""

    def temporaries(quantization: Any, num_layers: int) -> tuple[int, int]:
        """Bytes of the step's temporaries, and of the decoder's linears in float32."""
        text = {"num_hidden_layers": num_layers, "hidden_size": 128, "moe_intermediate_size": 72}
        vision = {"out_hidden_size": 128, "depth": 1, "deepstack_visual_indexes": [0]}
        config = tiny.variant(training.SMALL, text_config=text, vision_config=vision)
        model_path = write_hf_checkpoint(tmp_path / f"model{num_layers}", config, random_hf_tensors(config))
        lora = {"rank": 3, "targets": ["attention"], "base_quantization": quantization}
        settings = training.make_config(tmp_path / "run", model_path, lora=lora, backend={"remat": "full"})
        base = Base(settings)
        model, adapters = open_model(settings, None)
        tx = make_optimizer(settings.optimizer)
        state = dataclasses.replace(init_state(adapters(), tx), frozen=load_base(settings, base.weights, None))
        step = make_train_step(model, tx, schedule(ScheduleConfig(name="constant"), 1e-3, 4), state=state)
        memory: Any = step.lower(state, training.mixed_batches(config, 1)[0]).compile().memory_analysis()
        shapes = linears(base.weights.config)
        return memory.temp_size_in_bytes, sum(4 * math.prod(s) for path, s in shapes.items() if "language_model" in path)

    grown = {kind: np.subtract(temporaries(kind, 12), temporaries(kind, 4)) for kind in (None, "nf4")}
    more = (grown["nf4"][0] - grown[None][0]) / grown[None][1]
    record("nf4 base: growth of temporaries with layers, of the expanded weights' bytes", more)
    assert more < 0.15  # one that held them would have 1; a copy of the codes is 0.14
