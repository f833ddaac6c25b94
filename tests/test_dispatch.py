"""Routing, dispatch, experts' kernels and combine against a dense loop over experts, for any routing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvlmoe_jax import BackendConfig, Qwen3VLMoeConfig
from qvlmoe_jax.dispatch import combine, dispatch, sort_choices
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.experts import KERNELS
from qvlmoe_jax.model import load_balancing_loss
from qvlmoe_jax.moe import RouterStats, balanced_choice, route
from tests import ours, tiny, tolerances
from tests.hf_checkpoints import random_hf_tensors

TOKENS, EXPERTS, K, D, F = 24, 5, 3, 16, 12
NOBODY = EXPERTS


def _weights() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, D)).astype(np.float32)
    gate_up = (rng.standard_normal((EXPERTS, D, 2, F)) / D**0.5).astype(np.float32)
    down = (rng.standard_normal((EXPERTS, F, D)) / F**0.5).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(gate_up), jnp.asarray(down)


def dense_loop(x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
    """Every expert on every token, weighted by how often the token chose it: no sorting, nothing to get wrong."""
    y = jnp.zeros_like(x)
    for e in range(gate_up.shape[0]):
        hidden = jax.nn.silu(x @ gate_up[e, :, 0]) * (x @ gate_up[e, :, 1])
        y += (hidden @ down[e]) * jnp.sum(jnp.where(experts == e, weights, 0), axis=1, keepdims=True)
    return y


def sorted_experts(
    kernel: str, x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array, experts: jax.Array
) -> jax.Array:
    rows, order, sizes = dispatch(x, experts, gate_up.shape[0])
    return combine(KERNELS[kernel](rows, gate_up, down, sizes), order, weights)


routings = st.lists(st.lists(st.integers(0, NOBODY), min_size=K, max_size=K), min_size=TOKENS, max_size=TOKENS)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60)
@given(routing=routings, seed=st.integers(0, 9))
@example(routing=[[2] * K] * TOKENS, seed=0)  # all tokens to one expert
@example(routing=[[0, 4, 0]] * TOKENS, seed=0)  # the experts between are empty
@example(routing=[[NOBODY] * K] * TOKENS, seed=0)  # all padding
@example(routing=[[NOBODY] * K] * (TOKENS - 1) + [[4] * K], seed=0)
def test_dispatch_is_the_dense_loop_for_any_routing(kernel: str, routing: list[list[int]], seed: int) -> None:
    x, gate_up, down = _weights()
    weights = jax.random.uniform(jax.random.key(seed), (TOKENS, K))
    experts = jnp.asarray(routing, jnp.int32)
    found = _sorted_and_gradients(kernel)(x, gate_up, down, weights, experts)
    expected = _dense_and_gradients(x, gate_up, down, weights, experts)
    for name, a, b in zip(("y", "dx", "dgate_up", "ddown", "dweights"), found, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < tolerances.MODULE, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("routing", [[2, 0, 4], [1, 1, 1], [NOBODY, 3, NOBODY], [NOBODY] * 3], ids=str)
def test_fewer_rows_than_experts(kernel: str, routing: list[int]) -> None:
    """One token, three rows: the CPU's kernel goes row by row."""
    x, gate_up, down = _weights()
    given = x[:1], gate_up, down, jnp.asarray([[0.2, 0.5, 0.3]]), jnp.asarray([routing], jnp.int32)
    for a, b in zip(_sorted_and_gradients(kernel)(*given), _dense_and_gradients(*given), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < tolerances.MODULE


def _and_gradients(function):
    def run(x, gate_up, down, weights, experts):
        y, pullback = jax.vjp(lambda *a: function(*a, experts), x, gate_up, down, weights)
        return y, *pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.jit(run)


_dense_and_gradients = _and_gradients(dense_loop)
_SORTED = {kernel: _and_gradients(lambda *a, kernel=kernel: sorted_experts(kernel, *a)) for kernel in KERNELS}


def _sorted_and_gradients(kernel: str):
    return _SORTED[kernel]


def test_dispatch_sorts_and_loses_nothing() -> None:
    x = jnp.arange(TOKENS * D, dtype=jnp.float32).reshape(TOKENS, D)
    experts = jax.random.randint(jax.random.key(1), (TOKENS, K), 0, EXPERTS + 1)
    rows, order, sizes = dispatch(x, experts, EXPERTS)
    flat = np.asarray(experts).reshape(-1)
    assert np.array_equal(np.asarray(order.choices), np.argsort(flat, kind="stable"))
    assert np.array_equal(np.asarray(order.rows), np.argsort(np.asarray(order.choices)))
    assert np.array_equal(np.asarray(sizes), np.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS])
    assert np.array_equal(np.asarray(rows), np.asarray(x)[np.asarray(order.choices) // K])


@pytest.mark.parametrize("num_experts", [EXPERTS, 1 << 28], ids=["one number", "pairs"])
@pytest.mark.parametrize("tokens", [1, 2, 24, 43])
def test_choices_are_sorted_as_numbers_where_they_fit_and_as_pairs_where_not(num_experts: int, tokens: int) -> None:
    experts = jax.random.randint(jax.random.key(tokens), (tokens, K), 0, 7) * (num_experts // 5)  # some are nobody's
    order = sort_choices(experts, num_experts)
    expected = np.argsort(np.minimum(np.asarray(experts).reshape(-1), num_experts), kind="stable")
    assert np.array_equal(order.choices, expected) and np.array_equal(order.rows, np.argsort(expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_belong_to_nobody_come_out_zero(kernel: str) -> None:
    x, gate_up, down = _weights()
    y = KERNELS[kernel](x, gate_up, down, jnp.asarray([3, 0, 0, 7, 0], jnp.int32))
    assert np.all(np.asarray(y)[10:] == 0) and np.all(np.any(np.asarray(y)[:10] != 0, axis=1))


def test_tiles_of_many_sizes_agree() -> None:
    """Row counts from one tile to many: the tile size depends on the rows per expert."""
    _, gate_up, down = _weights()
    for rows in (1, 7, 8, 40, 300, 3000):
        x = jax.random.normal(jax.random.key(rows), (rows, D))
        sizes = np.bincount(np.random.default_rng(rows).integers(0, EXPERTS, rows), minlength=EXPERTS)
        expert_of = jnp.repeat(jnp.arange(EXPERTS), jnp.asarray(sizes), total_repeat_length=rows)
        expected = dense_loop(x, gate_up, down, jnp.ones((rows, 1)), expert_of[:, None])
        found = KERNELS["tiles"](x, gate_up, down, jnp.asarray(sizes, jnp.int32))
        assert np.abs(np.asarray(found) - np.asarray(expected)).max() < tolerances.MODULE, rows


def test_route_always_renormalises() -> None:
    logits = jax.random.normal(jax.random.key(0), (50, 8)) * 3
    probs, weights, experts = route(logits, 3)
    np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(np.asarray(probs).sum(1), 1, atol=1e-6)
    assert np.array_equal(np.asarray(experts), np.argsort(-np.asarray(logits), axis=1)[:, :3])
    assert route(logits.astype(jnp.bfloat16), 3)[1].dtype == jnp.bfloat16


def test_padding_reaches_no_expert() -> None:
    """Garbage in the padding's hidden state, even NaN, changes neither the valid tokens nor the sums."""
    model = ours.build_model(tiny.TINY, random_hf_tensors(tiny.TINY))
    block = ours.layer(model.model.language_model.slot_layers(_first_moe_slot()), 0).mlp
    x = np.random.default_rng(0).standard_normal((2, 6, 64)).astype(np.float32)
    valid = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], bool)
    y, stats = block(jnp.asarray(x), jnp.asarray(valid))
    x[~valid] = np.nan
    y_nan, stats_nan = block(jnp.asarray(x), jnp.asarray(valid))
    assert np.array_equal(np.asarray(y)[valid], np.asarray(y_nan)[valid])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), stats, stats_nan)
    assert float(stats.num_tokens) == valid.sum()
    assert float(stats.tokens_per_expert.sum()) == valid.sum() * 3


def _first_moe_slot():
    from qvlmoe_jax.layer_plan import slots

    return next(s for s in slots(Qwen3VLMoeConfig.from_hf(tiny.TINY).text_config) if s.kind == "moe")


def test_balanced_choice_is_balanced() -> None:
    weights, experts = balanced_choice(32, 8, 3, jnp.float32)
    assert np.array_equal(np.bincount(np.asarray(experts).reshape(-1)), [12] * 8)
    assert all(len(set(row)) == 3 for row in np.asarray(experts).tolist())
    np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-6)


def test_aux_loss_of_perfect_balance_is_k() -> None:
    stats = RouterStats(jnp.full((4, 8), 30.0), jnp.full((4, 8), 10.0), jnp.zeros(4), jnp.full((4,), 80.0))
    assert float(load_balancing_loss(stats)) == pytest.approx(3.0)


def test_backend_refuses_unknown_choices() -> None:
    message = "experts = 'magic' is not supported, expected one of auto, tiles, ragged_dot, tokamax"
    with pytest.raises(ConfigError, match=message):
        BackendConfig(experts="magic")  # pyright: ignore[reportArgumentType]


def test_auto_says_what_it_took(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level("INFO", logger="qvlmoe_jax"):
        assert BackendConfig().resolve("cpu").experts == "tiles"
        assert BackendConfig().resolve("gpu").experts == "tokamax"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert BackendConfig().resolve("gpu").experts == "tiles"
        assert BackendConfig().resolve("tpu").experts == "ragged_dot"
        assert BackendConfig(attention_chunk=512).attention_kernel(4096) == "chunked"
    assert [r.getMessage() for r in caplog.records] == [
        "experts kernel: tiles (auto on cpu)",
        "experts kernel: tokamax (auto on gpu)",
        "experts kernel: tiles (auto on gpu)",
        "experts kernel: ragged_dot (auto on tpu)",
        "attention kernel: splash (auto on tpu)",
        "attention kernel: chunked (auto, 4096 queries)",
    ]
