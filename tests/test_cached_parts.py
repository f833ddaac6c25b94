"""The decoder's inference-only parts against the ones they stand in for: attention over a cache, experts of a stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlmoe_jax import BackendConfig
from qvlmoe_jax.attention import attention
from qvlmoe_jax.cached_attention import cached_attention
from qvlmoe_jax.experts import KERNELS, ExpertStack, tiled_experts
from qvlmoe_jax.moe import count_choices
from tests.tolerances import MODULE

L, B, K, G, H = 3, 2, 2, 3, 8


@pytest.mark.parametrize("block", [4, 7, 64])
@pytest.mark.parametrize(("first", "new"), [(0, 21), (9, 1), (5, 11), (20, 1)])
def test_attention_over_a_cache(block: int, first: int, new: int) -> None:
    """New columns over a cache with holes are the last columns of attention over all; what lies behind them is not seen."""
    S, rng = 23, np.random.default_rng(block + new)
    used = first + new
    q, k, v = (rng.normal(size=(B, used, n, H)).astype(np.float32) for n in (K * G, K, K))
    valid = rng.random((B, S)) < 0.7
    valid[:, used:] = True  # stale, and must not matter
    segments = valid[:, :used].astype(np.int32)
    whole = attention(*map(jnp.asarray, (q, k, v)), segment_ids=jnp.asarray(segments), causal=True, backend=BackendConfig())
    caches = [rng.normal(size=(L, B, S, K, H)).astype(np.float32) for _ in range(2)]
    for cache, columns in zip(caches, (k, v), strict=True):
        cache[1, :, :used] = columns
    got = jax.jit(cached_attention, static_argnames="block")(
        q[:, first:], *caches, layer=jnp.int32(1), valid_BS=jnp.asarray(valid), first=jnp.int32(first), block=block
    )
    assert np.isfinite(got).all()
    own = segments[:, first:] > 0
    np.testing.assert_allclose(np.asarray(got)[own], np.asarray(whole)[:, first:][own], atol=MODULE, rtol=0)


E, D, F = 5, 12, 7


def rows_and_stacks() -> list[jax.Array]:
    """Nine rows, and gate_up and down of all layers."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, D), (L, E, D, 2, F), (L, E, F, D))]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@settings(max_examples=12)
@given(choices=st.lists(st.integers(0, E), min_size=9, max_size=9), layer=st.integers(0, L - 1))
def test_experts_of_a_stack(kernel, choices: list[int], layer: int) -> None:
    """Any routing, empty experts and rows of nobody (E) too; 9 rows are more than experts, 4 are fewer."""
    rows, gate_up, down = rows_and_stacks()
    sizes = count_choices(jnp.asarray(sorted(choices))[:, None], E)
    for count, groups in ((9, sizes), (4, jnp.zeros(E, jnp.int32).at[choices[0] % E].set(3))):
        expected = jax.jit(KERNELS["ragged_dot"])(rows[:count], gate_up[layer], down[layer], groups)
        stack = ExpertStack(gate_up, down, jnp.int32(layer))
        got = jax.jit(kernel)(rows[:count], gate_up[layer], down[layer], groups, stack)
        np.testing.assert_allclose(got, expected, atol=MODULE, rtol=MODULE)


def test_what_a_stack_saves_is_not_paid_in_gradients() -> None:
    """Read in the stack, the layer's own weights get the gradients; the stack, which stands for the same, none."""
    rows, gate_up, down = rows_and_stacks()
    groups = jnp.asarray([3, 0, 2, 1, 2], jnp.int32)

    def total(rows: jax.Array, gate_up: jax.Array, down: jax.Array, stack: ExpertStack | None) -> jax.Array:
        return jnp.sum(jnp.sin(tiled_experts(rows, gate_up, down, groups, stack)))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    expected = gradients(rows, gate_up[1], down[1], None)
    got = gradients(rows, gate_up[1], down[1], ExpertStack(gate_up, down, jnp.int32(1)))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    of_stack = jax.grad(lambda stack: total(rows, gate_up[1], down[1], ExpertStack(stack, down, jnp.int32(1))))(gate_up)
    assert not np.any(of_stack)
