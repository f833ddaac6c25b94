"""The training step on meshes of eight devices: the loss, every gradient and the curve of one device."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import make_mesh, shard_batch, tree_shardings
from tests import cases, ours, tolerances, training
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig, RouterConfig, ScheduleConfig
from train.optim import make_optimizer, schedule
from train.state import all_params, init_state
from train.step import make_train_step

SMALL = training.SMALL
Item = Text | Image | Video
CURVE_STEPS = 20
BIAS = np.random.default_rng(0).normal(0, 0.03, (2, 8)).astype(np.float32)
SGD_LIKE = OptimizerConfig(learning_rate=1e-4, clip_norm=1.0)

MESHES: list[tuple[dict[str, int], str]] = [
    ({"fsdp": 8}, "allgather"),
    ({"expert": 8}, "allgather"),
    ({"expert": 8}, "all_to_all"),
    ({"tensor": 2, "fsdp": 4}, "allgather"),
    ({"context": 2, "expert": 4}, "all_to_all"),
    ({"data": 2, "fsdp": 2, "expert": 2}, "all_to_all"),
    ({"tensor": 2, "context": 2, "expert": 2}, "allgather"),
]


def _name(value: Any) -> str:
    return "x".join(f"{axis}{n}" for axis, n in value.items()) if isinstance(value, dict) else str(value)


def rows() -> list[list[Item]]:
    """Eight rows: text only, one picture, many, a video; their lengths differ."""
    kinds: list[list[Item]] = [
        [Text(3), Image(2, 3), Text(4)],
        [Text(19)],
        [Image(1, 2), Text(2), Image(3, 2), Text(3)],
        [Text(2), Video(2, 2, 2), Text(6)],
    ]
    return kinds * 2


def packed_rows(batch: Batch) -> Batch:
    """The same rows cut into two documents each: attention stays inside, positions start again at the second."""
    segments = np.array(batch.segment_ids)
    positions = np.array(batch.position_ids)
    for b in range(len(segments)):
        text = (batch.segment_ids[b] > 0) & (batch.visual_index[b] < 0)
        last = np.flatnonzero(text)[-2:]  # the last two text tokens are a document of their own
        segments[b, last] = 2
        positions[:, b, last] = np.arange(len(last))
    return dataclasses.replace(batch, segment_ids=segments, position_ids=positions)


def make_batch(groups: int, *, seed: int = 3) -> Batch:
    """The eight rows, rolled by `seed`: other batches have other pictures in other rows."""
    config = Qwen3VLMoeConfig.from_hf(SMALL)
    inputs = cases.build(SMALL, rows()[-seed % 4 :] + rows()[: -seed % 4], seed=seed)
    labels = cases.shifted_labels(inputs, SMALL)
    return packed_rows(Batch.from_hf(config, **inputs, labels=labels, groups=groups, text_length=32))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_hf_tensors(SMALL)


def build(tensors: dict[str, np.ndarray], dispatch: str = "allgather") -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(SMALL, tensors, BackendConfig(dispatch=dispatch))  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """What one step of two microbatches says: its metrics, the gradients it applied, and the bias it leaves."""

    metrics: dict[str, Any]
    grads: dict[str, np.ndarray]


def first_step(
    tensors: dict[str, np.ndarray], dispatch: str, sizes: dict[str, int] | None, freeze: tuple[str, ...] = ()
) -> FirstStep:
    """Every loss is on, and a router bias that changes the choice of experts. The "optimizer" keeps the gradient as it is."""
    model = ours.build_model(SMALL, tensors, BackendConfig(dispatch=dispatch, remat="full"))  # pyright: ignore[reportArgumentType]
    mesh = None if sizes is None else make_mesh(**dict[str, Any](sizes))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        tx = optax.trace(decay=0.0)
        state = init_state(model.params(), tx, freeze=freeze, router_bias=BIAS.shape, mesh=mesh)
        bias = BIAS if mesh is None else jax.device_put(BIAS, NamedSharding(mesh, P()))
        state = dataclasses.replace(state, router_bias=bias)
        step = make_train_step(
            model,
            tx,
            lambda _: jax.numpy.float32(1e-3),
            loss=LossConfig(aux_loss=0.1, z_loss=0.01, router_z_loss=0.01, chunk_tokens=64),
            optimizer=OptimizerConfig(clip_norm=None),
            router=RouterConfig(bias_update_rate=0.01),
            state=state,
            mesh=mesh,
        )
        batch = training.stacked([make_batch(1 if mesh is None else 8, seed=seed) for seed in (3, 5)])
        batch = jax.tree.map(jax.numpy.asarray, batch) if mesh is None else shard_batch(batch, mesh)
        state, metrics = step.lower(state, batch).compile(compiler_options=training.QUICK)(state, batch)
        grads = {path: np.asarray(leaf) for path, leaf in flatten(state.opt_state.trace).items()}
        return FirstStep(jax.device_get(metrics), grads)


@pytest.fixture(scope="module")
def one_device(tensors: dict[str, np.ndarray]) -> FirstStep:
    return first_step(tensors, "allgather", None)


def compare(what: str, found: FirstStep, expected: FirstStep, record: Any) -> None:
    for key in ("loss", "aux_loss", "z_loss", "router_z_loss", "grad_norm"):
        assert float(found.metrics[key]) == pytest.approx(float(expected.metrics[key]), rel=tolerances.SAME_LOSS), key
    pairs = [(grad, expected.grads[path]) for path, grad in found.grads.items()]
    worst = max(float(np.linalg.norm(grad - wanted) / np.linalg.norm(wanted)) for grad, wanted in pairs)
    record(f"mesh gradients {what}: worst relative L2", worst)
    assert worst <= tolerances.GRADIENT
    # The loads are counts, and the bias moves by their signs: exactly one device's.
    stats, wanted = found.metrics["router"], expected.metrics["router"]
    assert np.array_equal(stats.tokens_per_expert, wanted.tokens_per_expert) and stats.tokens_per_expert.min() > 0
    assert np.array_equal(stats.num_tokens, wanted.num_tokens)
    assert np.array_equal(found.metrics["router_bias"], expected.metrics["router_bias"])
    np.testing.assert_allclose(stats.log_z_squared, wanted.log_z_squared, rtol=tolerances.SAME_LOSS)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dispatch"), MESHES, ids=_name)
def test_the_first_step_is_one_devices(
    sizes: dict[str, int], dispatch: str, tensors: dict[str, np.ndarray], one_device: FirstStep, record: Any
) -> None:
    found = first_step(tensors, dispatch, sizes)
    assert found.grads.keys() == one_device.grads.keys() == flatten(build(tensors).params()).keys()
    compare(f"{_name(sizes)} {dispatch}", found, one_device, record)


@pytest.mark.parametrize(
    ("sizes", "dispatch"),
    [pytest.param(*mesh, marks=pytest.mark.slow if i == 5 else pytest.mark.soak) for i, mesh in enumerate(MESHES)],
    ids=_name,
)
def test_frozen_parts_change_no_other_gradient(
    sizes: dict[str, int], dispatch: str, tensors: dict[str, np.ndarray], one_device: FirstStep, record: Any
) -> None:
    """The tower, the router and the head frozen: no gradient of theirs, and the others are one device's that trains all."""
    found = first_step(tensors, dispatch, sizes, freeze=("vision", "router", "lm_head/.*"))
    absent = {path for path in one_device.grads if re.search("visual/(patch|pos|blocks)|/gate/|^lm_head", path)}
    assert absent | found.grads.keys() == one_device.grads.keys()
    assert absent and not absent & found.grads.keys()
    norm = float(np.sqrt(sum(np.sum(np.square(one_device.grads[path], dtype=np.float64)) for path in found.grads)))
    assert float(found.metrics["grad_norm"]) == pytest.approx(norm, rel=tolerances.SAME_LOSS)
    expected = dataclasses.replace(one_device, metrics={**one_device.metrics, "grad_norm": norm})
    compare(f"{_name(sizes)} {dispatch}, parts frozen", found, expected, record)


def curve(
    tensors: dict[str, np.ndarray], dispatch: str, sizes: dict[str, int] | None, freeze: tuple[str, ...]
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some steps of AdamW, two microbatches each, with the auxiliary loss on."""
    model = build(tensors, dispatch)
    mesh = None if sizes is None else make_mesh(**dict[str, Any](sizes))
    tx, rate = make_optimizer(SGD_LIKE), schedule(ScheduleConfig(name="constant"), SGD_LIKE.learning_rate, CURVE_STEPS)
    params = jax.tree.map(jax.numpy.copy, model.params())
    if mesh is not None:
        params = jax.tree.map(jax.device_put, params, tree_shardings(params, mesh))
    state = init_state(params, tx, freeze=freeze, mesh=mesh)
    options: dict[str, Any] = {"loss": LossConfig(aux_loss=0.01, chunk_tokens=64), "optimizer": SGD_LIKE}
    step = make_train_step(model, tx, rate, state=state, mesh=mesh, **options)
    batch = training.stacked([make_batch(1 if mesh is None else 8)] * 2)
    losses, norms = [], []
    for _ in range(CURVE_STEPS):
        if mesh is None:
            state, metrics = step(state, batch)
        else:
            with jax.set_mesh(mesh):
                state, metrics = step(state, shard_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert len(flatten(all_params(state))) == len(flatten(model.params()))
    return losses, norms


@pytest.mark.parametrize(
    ("sizes", "dispatch", "freeze"),
    [
        pytest.param({"data": 2, "fsdp": 2, "expert": 2}, "allgather", (), marks=pytest.mark.soak),
        pytest.param({"expert": 4, "fsdp": 2}, "all_to_all", ("vision",), marks=pytest.mark.soak),
        pytest.param({"tensor": 2, "context": 2, "expert": 2}, "all_to_all", ("router",), marks=pytest.mark.soak),
    ],
    ids=_name,
)
def test_twenty_steps_follow_one_devices_curve(
    sizes: dict[str, int], dispatch: str, freeze: tuple[str, ...], tensors: dict[str, np.ndarray], record: Any
) -> None:
    expected, expected_norms = curve(tensors, dispatch, None, freeze)
    found, norms = curve(tensors, dispatch, sizes, freeze)
    assert expected[-1] < 0.95 * expected[0]  # it learns, so the curve says something
    assert norms[0] == pytest.approx(expected_norms[0], rel=1e-4)
    worst = float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))
    record(f"20 steps on {_name(sizes)}: worst relative loss difference", worst)
    assert worst <= tolerances.CURVE
