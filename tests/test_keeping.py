"""A bad step leaves every optimizer's state bit for bit, and Adam's numbers are optax's, without copies of its moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import OptimizerConfig
from train.keeping import Keeping, keeping, kept, scale_by_adam
from train.optim import make_optimizer

PARAMS = {"mlp": {"weight": jnp.linspace(-1, 1, 48).reshape(6, 8)}, "norm": {"weight": jnp.ones(8)}}


def gradients(seed: int) -> Any:
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(seed), p.shape) * 10.0 ** (seed - 3), PARAMS)


def equal(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)))


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_adam_is_optax_s_bit_for_bit(mu_dtype: Any) -> None:
    own, theirs = scale_by_adam(0.9, 0.95, 1e-8, mu_dtype), optax.scale_by_adam(0.9, 0.95, 1e-8, mu_dtype=mu_dtype)
    state, expected_state = own.init(PARAMS), theirs.init(PARAMS)
    for step in range(5):
        direction, state = own.update(gradients(step), state, PARAMS)
        expected, expected_state = theirs.update(gradients(step), expected_state, PARAMS)
        assert equal(direction, expected) and equal(state, expected_state), step


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "somebody's"])
def test_a_bad_step_leaves_the_state(name: Any) -> None:
    tx = keeping(optax.sgd(0.1, momentum=0.9)) if name == "somebody's" else make_optimizer(OptimizerConfig(name=name))
    assert isinstance(tx, Keeping) and keeping(tx) is tx
    update = jax.jit(tx.update)
    _, state = update(gradients(0), tx.init(PARAMS), PARAMS, good=jnp.bool_(True))
    bad = jax.tree.map(lambda g: g.at[..., 0].set(jnp.nan), gradients(1))
    _, after_bad = update(bad, state, PARAMS, good=jnp.bool_(False))
    assert equal(after_bad, state)
    _, after_good = update(gradients(1), state, PARAMS, good=jnp.bool_(True))
    assert not equal(after_good, state)


def test_adam_writes_its_moments_in_place() -> None:
    size = 1 << 20
    tx = make_optimizer(OptimizerConfig(name="adamw"))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        good = jnp.isfinite(optax.tree.sum(grads))
        direction, state = tx.update(grads, state, params, good=good)
        return kept(good, jax.tree.map(lambda p, d: p - 0.1 * d, params, direction), params), state

    params = {"mlp": {"weight": jnp.zeros(size)}}
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 3 * 4 * size
    assert memory.temp_size_in_bytes < 4 * size / 2, "a moment is copied before it is overwritten"
