"""Adapters in the model: what they compute, their gradients beside PEFT's, and PEFT's format both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.adapters import init_adapters, split_adapters, with_adapters
from qvlmoe_jax.errors import CheckpointError, ConfigError
from qvlmoe_jax.lora import PARTS, LoraConfig, adapter_paths, delta, linear_dims, target_paths
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.peft_format import WEIGHTS_FILE, load_adapter, save_adapter
from qvlmoe_jax.shards import ADAPTER_CONFIG
from tests import cases, lora_cases, ours, reference, tiny, tolerances, training
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig, ScheduleConfig
from train.optim import make_optimizer, schedule
from train.state import init_state
from train.step import forward_losses, make_train_step

# transformers' own, when PEFT asks its model about checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

EVERYTHING = LoraConfig(rank=3, alpha=6.0, targets=tuple(PARTS))
SOME = LoraConfig(rank=2, alpha=3.0, rslora=True, targets=(".*experts/down_proj", ".*[qv]_proj/weight", "merger"))


def build(config: dict[str, Any], backend: BackendConfig | None = None) -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(config, random_hf_tensors(config), backend)


def peft_model(config: dict[str, Any], directory: Path, *, trainable: bool = False) -> Any:
    """transformers' model with the adapter that PEFT reads from `directory`."""
    return peft.PeftModel.from_pretrained(
        reference.build_model(config, random_hf_tensors(config)), directory, is_trainable=trainable
    )


def peft_run(model: Any, inputs: cases.Inputs) -> Any:
    model.base_model.model.model.rope_deltas = None
    return model(**{key: reference.to_torch(value) for key, value in inputs.items()}, use_cache=False)


def test_new_adapters_change_nothing_and_others_are_the_merged_weights() -> None:
    config = tiny.TINY
    model, inputs = build(config), cases.CASES["two_images"](config)
    base = ours.logits(model, config, inputs)
    fresh = init_adapters(model, EVERYTHING, seed=3)
    assert np.array_equal(ours.logits(with_adapters(model, fresh, EVERYTHING), config, inputs), base)
    widths = {
        "q_proj": 64,
        "o_proj": 128,
        "gate_up_proj_": 64,
        "down_proj_": 24,
        "blocks/attn/proj": 48,
        "merger/linear_fc1": 192,
    }
    for path, leaf in flatten(fresh).items():
        if path.endswith("lora_B"):
            assert not np.asarray(leaf).any()
        for part, inputs_of_it in widths.items():
            if path.endswith((f"{part}/lora_A", f"{part}lora_A")):  # PEFT's: kaiming uniform with a = sqrt(5)
                assert 0.9 * inputs_of_it**-0.5 < float(np.abs(leaf).max()) <= inputs_of_it**-0.5, path
    adapters = lora_cases.random_adapters(model, EVERYTHING)
    found = ours.logits(with_adapters(model, adapters, EVERYTHING), config, inputs)
    flat, factors = flatten(model.params()), flatten(adapters)
    for path in target_paths(model.config, EVERYTHING.targets):
        a, b = (np.asarray(factors[place]) for place in adapter_paths(path))
        flat[path] = flat[path] + delta(a, b, (linear_dims(path) or (0,))[0], EVERYTHING.scale)
    merged = ours.logits(model.with_params(nest(flat)), config, inputs)
    valid = cases.valid(inputs)
    assert np.abs(found - merged)[valid].max() <= tolerances.MODULE
    assert np.abs(found - base)[valid].max() > 1


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("tiny", EVERYTHING),
        pytest.param("other", SOME, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in (("mixed", SOME), ("tied", EVERYTHING))),
    ],
)
def test_peft_loads_what_we_save_and_we_load_what_it_saves(name: str, lora: LoraConfig, tmp_path: Path, record: Any) -> None:
    config = tiny.ALL[name]
    model, inputs = build(config), cases.CASES["image"](config)
    adapters = lora_cases.random_adapters(model, lora)
    save_adapter(tmp_path / "ours", model.config, adapters, lora)
    loaded = peft_model(config, tmp_path / "ours")
    with torch.no_grad():
        expected = peft_run(loaded, inputs).logits.numpy()
    found = ours.logits(with_adapters(model, adapters, lora), config, inputs)
    error = np.abs(found - expected)[cases.valid(inputs)].max()
    record("adapted logits from PEFT's", error)
    assert error <= tolerances.MODULE
    assert np.abs(expected - ours.logits(model, config, inputs))[cases.valid(inputs)].max() > 0.1
    loaded.save_pretrained(str(tmp_path / "theirs"))
    described, back = load_adapter(tmp_path / "theirs", model.config)
    assert (described.rank, described.alpha, described.rslora) == (lora.rank, lora.alpha, lora.rslora)
    assert {*described.targets} == {*target_paths(model.config, lora.targets)}
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, adapters))


@pytest.mark.parametrize(
    "parameters",
    [
        ["mlp.experts.gate_up_proj"],
        ["layers.0.mlp.experts.down_proj", "layers.2.mlp.experts.gate_up_proj"],
        ["experts.down_proj", "layers.2.mlp.experts.gate_up_proj"],
    ],
    ids=["one of each layer", "another of another layer", "both of one layer"],
)
def test_some_layers_by_name_as_peft_users_choose_them(parameters: list[str], tmp_path: Path) -> None:
    """Two projections of one layer and parameters of experts: the other layers of the stack have zeros."""
    config = tiny.TINY
    base = reference.build_model(config, random_hf_tensors(config))
    chosen = peft.LoraConfig(
        r=2, lora_alpha=5, init_lora_weights=False, target_modules=["layers.2.self_attn.q_proj", "layers.4.self_attn.o_proj"],
        target_parameters=parameters,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, chosen).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model, inputs = build(config), cases.CASES["text"](config)
    lora, adapters = load_adapter(tmp_path / "theirs", model.config)
    found = ours.logits(with_adapters(model, adapters, lora), config, inputs)
    with torch.no_grad():
        expected = peft_run(theirs, inputs).logits.numpy()
    assert np.abs(found - expected)[cases.valid(inputs)].max() <= tolerances.MODULE


@pytest.mark.parametrize(
    "backend",
    [
        BackendConfig(),
        pytest.param(BackendConfig(experts="ragged_dot", remat="full"), marks=pytest.mark.slow),
    ],
    ids=["tiles", "ragged_remat"],
)
def test_gradients_are_pefts(backend: BackendConfig, tmp_path: Path, record: Any) -> None:
    config = tiny.TINY
    model, inputs = build(config, backend), cases.CASES["two_images"](config)
    adapters = lora_cases.random_adapters(model, EVERYTHING)
    save_adapter(tmp_path / "a", model.config, adapters, EVERYTHING)
    theirs = peft_model(config, tmp_path / "a", trainable=True)
    labels = cases.shifted_labels(inputs, config)
    out = peft_run(theirs, inputs | {"labels": labels})
    out.loss.backward()
    for parameter in theirs.parameters():  # PEFT's gradients, carried over by its own file format
        if parameter.grad is not None:
            parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    _, expected = load_adapter(tmp_path / "gradients", model.config)
    batch = training.labelled(config, inputs)

    def loss(params: Any) -> jax.Array:
        adapted = with_adapters(model, params, EVERYTHING)
        done = forward_losses(adapted, jax.tree.map(jnp.asarray, batch), chunk_tokens=64)
        return done.total / (done.targets_BT >= 0).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(adapters)
    assert float(value) == pytest.approx(out.loss.item(), abs=tolerances.AUX_LOSS)
    flat = flatten(grads)
    errors = {p: float(np.linalg.norm(flat[p] - g) / np.linalg.norm(g)) for p, g in flatten(expected).items()}
    record("worst relative L2 of an adapter's gradient", max(errors.values()))
    assert flat.keys() == errors.keys() and max(errors.values()) <= tolerances.GRADIENT, errors


def inputs_of(config: dict[str, Any], step: int) -> cases.Inputs:
    return cases.CASES[["image", "text", "two_images", "video"][step % 4]](config)


@pytest.mark.slow
def test_twenty_steps_follow_peft_and_torchs_adamw(tmp_path: Path, record: Any) -> None:
    config, steps, rate = tiny.TINY, 20, 5e-3
    model = build(config)
    adapters = init_adapters(model, EVERYTHING, seed=1)
    save_adapter(tmp_path / "a", model.config, adapters, EVERYTHING)
    theirs = peft_model(config, tmp_path / "a", trainable=True)
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    expected = []
    for step in range(steps):
        inputs = inputs_of(config, step)
        loss = peft_run(theirs, inputs | {"labels": cases.shifted_labels(inputs, config)}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        expected.append(loss.item())
    options = OptimizerConfig(learning_rate=rate, weight_decay=0.1, clip_norm=None)
    tx = make_optimizer(options)
    adapted = with_adapters(model, adapters, EVERYTHING)
    trained, base = split_adapters(adapted.params())
    state = init_state(nest({**flatten(trained), **flatten(base)}), tx, freeze=("(?!.*lora_[AB]$).*",))
    assert flatten(state.params).keys() == flatten(adapters).keys()
    train_step: Any = make_train_step(
        adapted, tx, schedule(ScheduleConfig(name="constant"), rate, steps), loss=LossConfig(chunk_tokens=48), optimizer=options
    )
    for step, loss in enumerate(expected):
        batch: Batch = training.stacked([training.labelled(config, inputs_of(config, step))])
        state, metrics = train_step(state, batch)
        error = abs(float(metrics["loss"]) - loss) / loss
        record("relative loss difference from PEFT over twenty steps", error)
        assert error <= tolerances.CURVE, step
    assert expected[-4] < 0.8 * expected[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = true is not supported"),
        ({"bias": "all"}, 'bias = "all" is not supported'),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "expected peft_type LORA"),
        ({"r": 4}, "has shape"),
        ({"r": 0}, "r = 0 and lora_alpha = .*, expected numbers more than 0"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": 0}, "lora_alpha = 0, expected"),
        ({"target_parameters": 5}, "target_parameters = 5, expected a list of names"),
        *(
            ({"init_lora_weights": way}, f'init_lora_weights = "{way}": the base weights were changed too')
            for way in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
        ),
        ({"target_parameters": None}, "belong to nothing that can be adapted"),
    ],
)
def test_what_is_more_than_lora_or_of_another_model_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build(training.SMALL)
    lora = LoraConfig(rank=2, targets=("experts", "attention"))
    save_adapter(tmp_path / "a", model.config, lora_cases.random_adapters(model, lora), lora)
    file = tmp_path / "a" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(tmp_path / "a", model.config)
    assert "\n" not in str(error.value)
    (tmp_path / "a" / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError):
        load_adapter(tmp_path / "a", model.config)


@pytest.mark.parametrize("way", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_ways_to_begin_that_leave_the_base_alone(way: Any, tmp_path: Path) -> None:
    model = build(training.SMALL)
    lora = LoraConfig(rank=2, targets=("attention",))
    adapters = lora_cases.random_adapters(model, lora)
    save_adapter(tmp_path / "a", model.config, adapters, lora)
    file = tmp_path / "a" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": way}))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "a", model.config)[1], adapters)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # PEFT's, while it converts
def test_pissa_is_read_once_saved_as_the_error_says(tmp_path: Path) -> None:
    config = training.SMALL
    chosen = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
    theirs: Any = peft.get_peft_model(reference.build_model(config, random_hf_tensors(config)), chosen).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    theirs.save_pretrained(str(tmp_path / "initial"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model, inputs = build(config), cases.CASES["text"](config)
    with torch.no_grad():
        expected = peft_run(theirs, inputs).logits.numpy()
    theirs.save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "pissa", model.config)
    theirs.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    lora, adapters = load_adapter(tmp_path / "plain", model.config)
    found = ours.logits(with_adapters(model, adapters, lora), config, inputs)
    assert np.abs(found - expected)[cases.valid(inputs)].max() <= tolerances.MODULE


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=2, targets=("attention",)), "unknown parameters, first .*experts.*the tree their LoraConfig"),
        (LoraConfig(rank=2, targets=("attention", "experts", "vision")), "missing parameters, first .*visual"),
        (LoraConfig(rank=3, targets=("attention", "experts")), r"has shape .*, expected \["),
    ],
    ids=["more", "fewer", "another rank"],
)
def test_adapters_are_those_their_config_describes(lora: LoraConfig, message: str, tmp_path: Path) -> None:
    """More were left out of the directory in silence, and those of another rank scaled by another number."""
    model = build(training.SMALL)
    adapters = lora_cases.random_adapters(model, LoraConfig(rank=2, targets=("attention", "experts")))
    with pytest.raises(CheckpointError, match=message):
        with_adapters(model, adapters, lora)
    with pytest.raises(CheckpointError, match=message):
        save_adapter(tmp_path / "a", model.config, adapters, lora)
    assert not list(tmp_path.iterdir())


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path: Path) -> None:
    model, lora = build(training.SMALL), LoraConfig(rank=2, targets=("attention",))
    with pytest.raises(CheckpointError, match="the model has adapters.*save_adapter"):
        with_adapters(model, lora_cases.random_adapters(model, lora), lora).save_pretrained(tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("no_such",), "'no_such' matches no weight"),
        ((".*embed_tokens/weight",), "matches no weight that can be adapted"),
        (("(",), "is not a regular expression"),
        (("mlp",), "names nothing that this model has"),
        ((), "names nothing"),
    ],
)
def test_targets_that_name_nothing_are_refused(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_paths(build(training.SMALL).config, targets)
