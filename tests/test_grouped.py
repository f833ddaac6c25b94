"""Products that are each row's own expert's, by kernels that leave undefined what belongs to nobody."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokamax

from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.grouped import ragged_product, tokamax_product

SIZES = jnp.asarray([3, 0, 4, 0], jnp.int32)
ROWS = 7


@jax.custom_vjp
def as_on_a_gpu(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`, but for rows of nobody and, in gradients, experts of no rows, which are as memory was."""
    return jax.lax.ragged_dot(rows, w, sizes).at[ROWS:].set(jnp.nan)


def _backward(inputs: Any, d_out: jax.Array) -> tuple[Any, ...]:
    rows, w, sizes = inputs
    _, pullback = jax.vjp(lambda rows, w: jax.lax.ragged_dot(rows, w, sizes), rows, w)
    d_rows, d_w = pullback(d_out)
    return d_rows.at[ROWS:].set(jnp.nan), jnp.where((sizes > 0)[:, None, None], d_w, jnp.nan), None


as_on_a_gpu.defvjp(lambda *inputs: (as_on_a_gpu(*inputs), inputs), _backward)


def test_what_a_kernel_leaves_undefined_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two products with an activation between, as the experts have."""
    monkeypatch.setattr(tokamax, "ragged_dot", lambda rows, w, sizes, **_: as_on_a_gpu(rows, w, sizes))
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 6), (4, 6, 5), (4, 5, 6))]

    def total(product: Any) -> Any:
        return lambda x, w, v: jnp.sum(jnp.square(product(jax.nn.silu(product(x, w, SIZES)), v, SIZES)[:ROWS]))

    assert not np.asarray(tokamax_product(inputs[0], inputs[1], SIZES))[ROWS:].any()
    expected, found = (jax.jit(jax.value_and_grad(total(p), (0, 1, 2)))(*inputs) for p in (ragged_product, tokamax_product))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ConfigError, match=r"experts = 'tokamax': .* not installed; pip install 'qvlmoe_jax\[gpu\]'"):
        tokamax_product(jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.asarray([2]))
