"""Adapters on meshes of eight devices: the loss and every adapter's gradient are one device's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.adapters import adapt, split_adapters
from qvlmoe_jax.lora import PARTS, LoraConfig
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.quantised_base import QuantisedBase
from qvlmoe_jax.sharding import make_mesh, partition_spec, shard_batch, tree_shardings
from tests import lora_cases, tolerances
from tests.collective_order import loose
from tests.hf_checkpoints import random_hf_tensors
from tests.test_mesh_training import MESHES, SMALL, build, make_batch
from train.step import forward_losses

LORA = LoraConfig(rank=4, alpha=6.0, targets=tuple(PARTS))


def name(value: Any) -> str:
    return "x".join(f"{axis}{n}" for axis, n in value.items()) if isinstance(value, dict) else str(value)


def adapted(dispatch: str, lora: LoraConfig) -> Qwen3VLMoeForConditionalGeneration:
    """The model with adapters that are not zero, its base quantised if `lora` says so."""
    base = build(random_hf_tensors(SMALL), dispatch)
    adapters = lora_cases.random_adapters(base, lora)
    if lora.base_quantization is None:
        params = flatten(base.params())
    else:
        in_memory: Any = lora_cases.InMemory(base)
        source = QuantisedBase(in_memory, lora.base_quantization, np.dtype(np.float32))
        params = {path: jax.numpy.asarray(source.read(path)) for path in source.shapes}
    return adapt(base, lora).with_params(nest({**params, **flatten(adapters)}))


def loss_and_gradients(model: Qwen3VLMoeForConditionalGeneration, batch: Any) -> tuple[float, dict[str, Any], Any]:
    adapters, base = split_adapters(model.params())

    def loss(adapters: Any, base: Any, batch: Any) -> jax.Array:
        ready = model.with_params(nest({**flatten(base), **flatten(adapters)}))
        return forward_losses(ready, batch, chunk_tokens=64, scale=1 / 100).total

    program = jax.jit(jax.value_and_grad(loss)).lower(adapters, base, jax.tree.map(jax.numpy.asarray, batch)).compile()
    value, grads = program(adapters, base, jax.tree.map(jax.numpy.asarray, batch))
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten(grads).items()}, program


@pytest.fixture(scope="module")
def one_device() -> dict[Any, tuple[float, dict[str, Any]]]:
    return {}


@pytest.mark.parametrize(
    ("sizes", "dispatch", "quantization"),
    [
        *(pytest.param(*mesh, None, marks=pytest.mark.slow if i == 6 else pytest.mark.soak) for i, mesh in enumerate(MESHES)),
        pytest.param({"tensor": 2, "fsdp": 2, "expert": 2}, "allgather", "nf4", marks=pytest.mark.soak),
        pytest.param({"fsdp": 4, "expert": 2}, "all_to_all", "int8", marks=pytest.mark.soak),
    ],
    ids=name,
)
def test_loss_and_adapters_gradients_are_one_devices(
    sizes: dict[str, int], dispatch: str, quantization: Any, one_device: dict[Any, tuple[float, dict[str, Any]]], record: Any
) -> None:
    lora = LoraConfig(rank=LORA.rank, alpha=LORA.alpha, targets=LORA.targets, base_quantization=quantization)
    model, mesh = adapted(dispatch, lora), make_mesh(**dict[str, Any](sizes))
    if quantization not in one_device:
        one_device[quantization] = loss_and_gradients(model, make_batch(1))[:2]
    expected, expected_grads = one_device[quantization]
    placed = model.with_params(jax.tree.map(jax.device_put, model.params(), tree_shardings(model.params(), mesh)))
    with jax.set_mesh(mesh):
        loss, grads, program = loss_and_gradients(placed, shard_batch(make_batch(8), mesh))
    assert not loose(program.as_text())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == expected_grads.keys()
    worst = max(float(np.linalg.norm(grads[p] - g) / np.linalg.norm(g)) for p, g in expected_grads.items())
    record(f"mesh adapter gradients {name(sizes)} {dispatch}: worst relative L2", worst)
    assert worst <= tolerances.GRADIENT


def test_adapters_are_sharded_by_the_table() -> None:
    """No factor of a large model is replicated over fsdp: A's inputs or rows, B's outputs take it."""
    mesh = make_mesh(fsdp=4, tensor=2)
    for path, leaf in flatten(lora_cases.random_adapters(build(random_hf_tensors(SMALL)), LORA)).items():
        spec = partition_spec(path, leaf.shape, mesh)
        assert "fsdp" in jax.tree.leaves([list(e) if isinstance(e, tuple) else e for e in spec]), (path, spec)
