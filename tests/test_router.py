"""Router health: the bias that balances without a loss, the router's z-loss, and what freezing the router leaves of both."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.checkpoint import load_params, open_weights
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.layer_plan import slots
from qvlmoe_jax.moe import count_choices, route, route_with_bias
from qvlmoe_jax.param_tree import flatten
from tests import cases, ours, tiny, tolerances, training
from tests.hf_checkpoints import random_hf_tensors
from tests.test_train_step import joined
from train.config import LossConfig, OptimizerConfig, RouterConfig, ScheduleConfig
from train.errors import TrainingError
from train.evaluate import make_evaluate, validate
from train.loop import train
from train.metrics import read_metrics
from train.optim import make_optimizer, schedule
from train.router import bias_shape, moved_bias
from train.run_files import export_run
from train.state import TrainState, init_state
from train.step import make_train_step

CONFIG = tiny.variant(
    training.SMALL,
    text_config={"num_hidden_layers": 3, "mlp_only_layers": [1]},
    vision_config={"depth": 1, "deepstack_visual_indexes": [0]},
)
"""The second of three layers is dense: the bias has two rows, and the second is the third layer's."""
LAYERS, EXPERTS, K = 2, 8, 3
RATE = 0.01
LOSSES = LossConfig(aux_loss=0.5, router_z_loss=0.5)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, clip_norm=None)


@pytest.fixture(scope="module")
def model() -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(CONFIG, random_hf_tensors(CONFIG))


def text_batches(accumulation: int) -> Any:
    """A batch `[A,2,64]` without pictures: the tower routes nothing, and half the program is its."""
    rng = np.random.default_rng(0)
    rows = [[[cases.Text(int(n))] for n in rng.integers(9, 60, 2)] for _ in range(accumulation)]
    made = [training.labelled(CONFIG, cases.build(CONFIG, r, seed=i), text_length=64) for i, r in enumerate(rows)]
    return training.stacked(made)


@functools.cache
def compiled_step(loss: LossConfig, accumulation: int, with_bias: bool, freeze: tuple[str, ...]) -> Any:
    model = ours.build_model(CONFIG, random_hf_tensors(CONFIG))
    state = fresh(model, np.zeros((LAYERS, EXPERTS), np.float32) if with_bias else None, freeze)
    rate = schedule(ScheduleConfig(name="constant"), OPTIMIZER.learning_rate, 10)
    router = RouterConfig(bias_update_rate=RATE)
    one = make_train_step(model, make_optimizer(OPTIMIZER), rate, loss=loss, optimizer=OPTIMIZER, router=router)
    four = text_batches(4)
    return one.lower(state, four if accumulation == 4 else joined(four)).compile(compiler_options=training.QUICK)


def fresh(model: Any, bias: np.ndarray | None, freeze: tuple[str, ...]) -> TrainState:
    params = jax.tree.map(jnp.copy, model.params())
    state = init_state(params, make_optimizer(OPTIMIZER), freeze=freeze, router_bias=None if bias is None else bias.shape)
    return state if bias is None else dataclasses.replace(state, router_bias=jnp.asarray(bias))


def step(
    model: Any, *, loss: LossConfig = LOSSES, bias: np.ndarray | None = None, accumulation: int = 1, freeze: tuple[str, ...] = ()
) -> tuple[TrainState, dict[str, Any]]:
    """State and metrics after one step on the same eight rows, in 1 or 4 microbatches; without `bias` the run has none."""
    four = text_batches(4)
    batch = jax.tree.map(jnp.asarray, four if accumulation == 4 else joined(four))
    state = fresh(model, bias, freeze)
    after, metrics = compiled_step(loss, accumulation, bias is not None, freeze)(state, batch)
    return after, jax.device_get(metrics)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(40, EXPERTS)).astype(np.float32), rng.normal(0, 0.2, EXPERTS).astype(np.float32)
    probs, weights, experts = (np.asarray(a) for a in route_with_bias(jnp.asarray(logits), K, jnp.asarray(bias)))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(probs, expected, rtol=1e-5)
    assert np.array_equal(experts, np.argsort(-(probs + bias), axis=-1)[:, :K])
    assert not np.array_equal(experts, np.argsort(-probs, axis=-1)[:, :K])
    chosen = np.take_along_axis(probs, experts, -1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)
    for a, b in zip(route_with_bias(jnp.asarray(logits), K, jnp.zeros(EXPERTS)), route(jnp.asarray(logits), K), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # experts whose probability is zero in float32, chosen by their bias: no division of zero by zero, forward or backward
    far = jnp.asarray([[0.0] * 4 + [-200.0] * 4])
    push = jnp.asarray([0.0] * 4 + [9.0] * 4)
    assert np.all(np.isfinite(route_with_bias(far, K, push)[1]))
    assert np.all(np.isfinite(jax.grad(lambda z: route_with_bias(z, K, push)[1].sum())(far)))


def test_the_bias_moves_towards_the_mean_load() -> None:
    loads = jnp.asarray([[4.0, 8, 12, 8], [0, 0, 32, 0]])
    found = moved_bias(jnp.full((2, 4), 0.5), loads, 0.25)
    assert np.array_equal(found, [[0.75, 0.5, 0.25, 0.5], [0.75, 0.75, 0.25, 0.75]])


def test_the_bias_balances_a_skewed_router() -> None:
    logits = jax.random.normal(jax.random.key(0), (2000, EXPERTS)) + jnp.linspace(0, 3, EXPERTS)

    def update(bias: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        load = count_choices(route_with_bias(logits, K, bias)[2], EXPERTS)
        return moved_bias(bias[None], load[None].astype(jnp.float32), 0.002)[0], load.max() / load.mean()

    _, worst = jax.lax.scan(update, jnp.zeros(EXPERTS), None, length=400)
    assert float(worst[0]) > 2 and float(worst[-50:].max()) < 1.1


def test_the_step_moves_the_bias_by_the_loads_of_all_microbatches(model: Any) -> None:
    start = np.random.default_rng(1).normal(0, 0.05, (LAYERS, EXPERTS)).astype(np.float32)
    linear = LossConfig(router_z_loss=0.5)  # the aux loss of four microbatches is not that of one
    _, expected = step(model, loss=linear, bias=start)
    after, metrics = step(model, loss=linear, bias=start, accumulation=4)
    load = metrics["router"].tokens_per_expert
    valid = int(np.sum(text_batches(4).segment_ids > 0))
    assert load.shape == (LAYERS, EXPERTS) and np.all(load.sum(-1) == K * valid)
    np.testing.assert_allclose(metrics["router_bias"], start + RATE * np.sign(load.mean(-1, keepdims=True) - load), atol=1e-7)
    assert np.array_equal(metrics["router_bias"], expected["router_bias"])
    assert np.array_equal(np.asarray(after.router_bias), metrics["router_bias"])
    assert np.array_equal(load, expected["router"].tokens_per_expert)
    for key in ("loss", "grad_norm", "router_z_loss"):
        assert float(metrics[key]) == pytest.approx(float(expected[key]), rel=tolerances.SAME_LOSS), key
    # a bias whose rows belong to other layers would route otherwise
    _, swapped = step(model, loss=linear, bias=start[::-1].copy())
    assert not np.array_equal(swapped["router"].tokens_per_expert, load)
    assert abs(float(swapped["loss"]) / float(metrics["loss"]) - 1) > 10 * tolerances.SAME_LOSS


def test_a_bad_step_leaves_the_bias(model: Any) -> None:
    start = np.full((LAYERS, EXPERTS), 0.125, np.float32)
    broken = model.with_params(jax.tree.map(lambda p: p * jnp.nan, model.params()))
    after, metrics = step(broken, bias=start)
    assert int(metrics["bad_steps"]) == 1 and np.array_equal(np.asarray(after.router_bias), start)


def test_router_z_loss_is_the_formula(model: Any) -> None:
    """Against the router's logits computed here from the block's input; and it reaches the router."""
    slot = next(slot for slot in slots(model.config.text_config) if slot.kind == "moe")
    block = ours.layer(model.model.language_model.slot_layers(slot), 0).mlp
    x = np.random.default_rng(0).normal(size=(2, 6, 64)).astype(np.float32)
    valid = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], bool)
    _, stats = block(jnp.asarray(x), jnp.asarray(valid))
    logits = x.astype(np.float64) @ np.asarray(block.gate.weight[...], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))[valid]
    assert float(stats.log_z_squared) == pytest.approx(np.sum(log_z**2), rel=1e-5)

    start = np.zeros((LAYERS, EXPERTS), np.float32)
    plain_state, plain = step(model, loss=LossConfig(), bias=start)
    state, metrics = step(model, bias=start)
    per_layer = metrics["router"].log_z_squared / metrics["router"].num_tokens
    assert per_layer.shape == (LAYERS,)
    assert float(metrics["router_z_loss"]) == pytest.approx(float(per_layer.mean()), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6)
    gates = [path for path in flatten(state.params) if "mlp/gate/" in path]
    assert len(gates) == LAYERS
    for path in gates:
        with_it, without = (flatten(s.opt_state[0].mu)[path] for s in (state, plain_state))
        assert float(jnp.linalg.norm(with_it - without)) > 0.1 * float(jnp.linalg.norm(without)), path


def test_a_frozen_router_has_no_gradient_and_the_rest_still_works(model: Any) -> None:
    """The bias still balances; the losses are still reported, and still move what feeds the router."""
    start = np.zeros((LAYERS, EXPERTS), np.float32)
    after, metrics = step(model, bias=start, freeze=("router",))
    free, _ = step(model, bias=start)
    trees = (after.params, after.opt_state[0].mu, after.opt_state[0].nu)
    assert not any("mlp/gate/" in path for tree in trees for path in flatten(tree))
    gates = {path: leaf for path, leaf in flatten(after.frozen).items() if "mlp/gate/" in path}
    assert len(gates) == LAYERS
    for path, leaf in gates.items():
        assert np.array_equal(leaf, flatten(model.params())[path])
    load = metrics["router"].tokens_per_expert
    np.testing.assert_allclose(np.asarray(after.router_bias), RATE * np.sign(load.mean(-1, keepdims=True) - load), atol=1e-7)
    assert float(metrics["aux_loss"]) > 1 and float(metrics["router_z_loss"]) > 0
    for path, moment in flatten(after.opt_state[0].mu).items():  # the other gradients are those of a run that trains all
        np.testing.assert_allclose(moment, flatten(free.opt_state[0].mu)[path], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dense", [[0], [0, 1], [2]], ids=["first", "first two", "last"])
def test_layers_without_experts_take_no_row_of_the_bias(dense: list[int]) -> None:
    """In front, behind: a bias of the one expert makes every token of its layer choose it."""
    config = tiny.variant(CONFIG, text_config={"mlp_only_layers": dense})
    model = ours.build_model(config, random_hf_tensors(config))
    batch = jax.tree.map(lambda a: a[0], text_batches(1))
    rows = 3 - len(dense)
    bias = np.zeros((rows, EXPERTS), np.float32)
    bias[-1, 5] = 2.0
    stats = jax.jit(lambda m, b, bias: m.model(b, router_bias=bias).router_stats)(model, batch, bias)
    assert stats.tokens_per_expert.shape == (rows, EXPERTS)
    assert stats.tokens_per_expert[-1, 5] == stats.num_tokens[-1]


def test_a_dense_model_has_no_bias() -> None:
    assert bias_shape(RouterConfig(), Qwen3VLMoeConfig.from_hf(tiny.DENSE)) is None
    with pytest.raises(ConfigError, match=r"bias_update_rate = 0.1, but the model has no layer with experts"):
        bias_shape(RouterConfig(bias_update_rate=0.1), Qwen3VLMoeConfig.from_hf(tiny.DENSE))
    with pytest.raises(ConfigError, match=r"bias_update_rate = -1, expected 0 or more"):
        RouterConfig(bias_update_rate=-1)


@pytest.mark.soak
def test_a_run_keeps_its_bias_and_says_when_it_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpointed, resumed bit for bit, used in validation, and never dropped without a word."""
    directory = training.write_model(tmp_path / "model", CONFIG)
    batches = [text_batches(1)]
    held_out = {"data": {"sources": [{"path": "unused.jsonl"}]}, "every": 100}

    def run(name: str, steps: int, rate: float = RATE, **changes: Any) -> TrainState:
        changes = {"router": {"bias_update_rate": rate}, "validation": held_out, **changes}
        config = training.make_config(tmp_path / name, directory, steps=steps, **changes)
        return train(config, data=training.ListData(batches), validation=lambda: batches)

    caplog.set_level(logging.WARNING, logger="qvlmoe_jax")
    whole = run("whole", 3, checkpoint={"every": 0, "export": True})
    run("resumed", 1)
    assert sum("router bias" in line for line in caplog.messages) == 1  # the one that exported
    resumed = run("resumed", 3)
    assert whole.router_bias is not None and float(jnp.abs(whole.router_bias).max()) > 0
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(TrainingError, match="1 arrays are not this config's, first 'router/bias'"):
        run("resumed", 4, rate=0.0)

    lines = read_metrics(tmp_path / "whole")
    assert [len(lines[0]["router"][key]) for key in ("max_over_mean", "z_loss", "bias")] == [LAYERS] * 3
    abstract = Qwen3VLMoeForConditionalGeneration.abstract(Qwen3VLMoeConfig.from_hf(CONFIG))
    evaluate = make_evaluate(abstract, chunk_tokens=1024, compute_dtype=jnp.float32)
    with_bias = validate(evaluate, whole, [jax.tree.map(jnp.asarray, batches[0])])
    pushed = dataclasses.replace(whole, router_bias=whole.router_bias.at[:, :K].add(2.0))
    assert lines[-1]["validation_loss"] == pytest.approx(with_bias["validation_loss"], rel=1e-6)
    assert validate(evaluate, pushed, [jax.tree.map(jnp.asarray, batches[0])]) != with_bias

    said = "the router bias of the run .* is left out, because Hugging Face's architecture has none"
    load_params(open_weights(tmp_path / "whole"))
    export_run(tmp_path / "whole" / "checkpoints" / "3", tmp_path / "exported")
    hits = [line for line in caplog.messages if "router bias" in line]
    assert len(hits) == 3 and all("\n" not in line for line in hits)
    assert all(re.search(said, line) for line in hits)
