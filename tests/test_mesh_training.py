"""The training step on meshes of eight devices: the loss, every gradient and the curve of one device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import make_mesh, shard_batch, tree_shardings
from tests import cases, ours, tolerances, training
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig, ScheduleConfig
from train.optim import make_optimizer, schedule
from train.state import all_params, init_state
from train.step import forward_losses, make_train_step

SMALL = training.SMALL
Item = Text | Image | Video
CURVE_STEPS = 20
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


def make_batch(groups: int) -> Batch:
    config = Qwen3VLMoeConfig.from_hf(SMALL)
    inputs = cases.build(SMALL, rows(), seed=3)
    labels = cases.shifted_labels(inputs, SMALL)
    return packed_rows(Batch.from_hf(config, **inputs, labels=labels, groups=groups, text_length=32))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_hf_tensors(SMALL)


def build(tensors: dict[str, np.ndarray], dispatch: str = "allgather") -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(SMALL, tensors, BackendConfig(dispatch=dispatch))  # pyright: ignore[reportArgumentType]


def loss_and_gradients(model: Qwen3VLMoeForConditionalGeneration, batch: Batch) -> tuple[float, dict[str, Any]]:
    def loss(params: Any, batch: Batch) -> jax.Array:
        losses, _, _ = forward_losses(model.with_params(params), batch, chunk_tokens=64)
        return losses.cross_entropy.sum() / 100

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params(), jax.tree.map(jax.numpy.asarray, batch))
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten(grads).items()}


@pytest.fixture(scope="module")
def one_device(tensors: dict[str, np.ndarray]) -> tuple[float, dict[str, Any]]:
    return loss_and_gradients(build(tensors), make_batch(1))


@pytest.mark.parametrize(
    ("sizes", "dispatch"),
    [
        pytest.param(*mesh, marks=pytest.mark.slow if i in (0, 2, 4, 5, 6) else pytest.mark.soak) for i, mesh in enumerate(MESHES)
    ],
    ids=_name,
)
def test_loss_and_every_gradient_are_one_devices(
    sizes: dict[str, int], dispatch: str, tensors: dict[str, np.ndarray], one_device: tuple[float, dict[str, Any]], record: Any
) -> None:
    model, mesh = build(tensors, dispatch), make_mesh(**dict[str, Any](sizes))
    model = model.with_params(jax.tree.map(jax.device_put, model.params(), tree_shardings(model.params(), mesh)))
    with jax.set_mesh(mesh):
        loss, grads = loss_and_gradients(model, shard_batch(make_batch(8), mesh))
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    worst = max(float(np.linalg.norm(grads[p] - g) / np.linalg.norm(g)) for p, g in one_device[1].items())
    record(f"mesh gradients {_name(sizes)} {dispatch}: worst relative L2", worst)
    assert worst <= tolerances.GRADIENT


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
