"""Experts' gradients that come back through all layers in one array are those of each layer's own weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvlmoe_jax import BackendConfig
from qvlmoe_jax.param_tree import flatten, nest
from tests import ours, tiny
from tests.hf_checkpoints import random_hf_tensors

IN_TURN = "dense and MoE in turn"
KINDS = {
    "all MoE": dict(num_hidden_layers=3, mlp_only_layers=[]),
    IN_TURN: dict(num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[]),
    "dense first, then MoE": dict(num_hidden_layers=4, mlp_only_layers=[0]),
}


def text_model(changes: dict[str, Any], remat: Any) -> Any:
    config = tiny.variant(tiny.TINY, text_config=changes)
    return ours.build_model(config, random_hf_tensors(config), BackendConfig(remat=remat))


def loss_of(model: Any, tokens: int) -> Callable[..., jax.Array]:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (1, tokens)))

    def loss(trained: dict[str, Any], frozen: dict[str, Any]) -> jax.Array:
        own = model.with_params(nest(trained | frozen))
        return jnp.sum(jnp.sin(own.model.language_model(ids).last_hidden_state))

    return loss


def assert_same(got: jax.Array, expected: jax.Array, path: str) -> None:
    """To 1e-5 of the largest: two programs, which round apart."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(expected))), err_msg=path)


@pytest.mark.parametrize(
    ("kind", "remat", "tokens"), [*((kind, "none", 70) for kind in KINDS), (IN_TURN, "full", 70), (IN_TURN, "dots", 2)]
)
def test_the_gradient_is_that_of_each_layers_own(kind: str, remat: str, tokens: int) -> None:
    """A `jit` that is differentiated as a whole hides the derivative, and takes the other way. Two tokens go row by row."""
    model = text_model(KINDS[kind], remat)
    params = flatten(model.params())
    loss = loss_of(model, tokens)
    one_array = jax.jit(jax.grad(loss))(params, {})
    own = jax.grad(jax.jit(loss))(params, {})
    experts = [path for path in params if "/experts/" in path]
    assert experts and all(np.any(one_array[path]) for path in experts)
    for path in params:
        assert_same(one_array[path], own[path], path)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_layer_is_copied_for_its_gradient(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the temporaries that there are with gradients of each layer's own, a layer's experts are saved."""
    model = text_model(dict(num_hidden_layers=3, mlp_only_layers=[], moe_intermediate_size=2048), remat)
    params = flatten(model.params())
    layer = sum(a.nbytes for path, a in params.items() if "/experts/" in path) // 3

    def temporaries() -> int:
        memory = jax.jit(jax.grad(loss_of(model, 70))).lower(params, {}).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    one_array = temporaries()
    monkeypatch.setattr("qvlmoe_jax.text.passed_on", lambda stack: None)
    assert one_array < temporaries() - 0.9 * layer


def test_half_frozen_experts() -> None:
    """One of the two trained alone has its gradient."""
    model = text_model(KINDS["all MoE"], "none")
    params = flatten(model.params())
    frozen = {path: a for path, a in params.items() if path.endswith("gate_up_proj")}
    trained = {path: a for path, a in params.items() if path not in frozen}
    loss = loss_of(model, 70)
    whole, half = jax.jit(jax.grad(loss))(params, {}), jax.jit(jax.grad(loss))(trained, frozen)
    for path in trained:
        assert_same(half[path], whole[path], path)


def test_the_layers_keep_their_weights() -> None:
    """What is left out of the scan's gradients is still in the model."""
    model = text_model(KINDS["all MoE"], "none")
    before = jax.tree.map(np.asarray, nnx.state(model.model.language_model))
    jax.grad(loss_of(model, 4))(flatten(model.params()), {})
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model.model.language_model))
