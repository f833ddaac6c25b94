"""Any mesh, any batch, any routing: loss, gradients and loads are one device's."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import AXES, make_mesh, shard_batch, tree_shardings
from tests import cases, ours, tiny, tolerances, training
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors
from train.accumulate import accumulate
from train.router import router_losses
from train.step import forward_losses

Item = Text | Image | Video
EXPERTS, ROWS = 8, 8
LENGTH, PATCHES = 32, 64  # columns of a row, patches of a vision row: every drawn document fits
MESHES = [sizes for sizes in itertools.product(range(1, 9), repeat=len(AXES)) if 2 <= math.prod(sizes) <= 8]


class Case(NamedTuple):
    """`groups` of the vision input; `liked[l][e]` > 0 draws all tokens to that expert, < 0 keeps them from it."""

    sizes: tuple[int, ...]
    dispatch: str
    k: int
    groups: int
    rows: list[list[Item]]
    liked: list[list[int]]


def documents() -> st.SearchStrategy[list[Item]]:
    """One row, of at least one text token; at most 32 columns and 48 patches."""
    image = st.builds(Image, st.integers(1, 2), st.integers(1, 3))
    video = st.builds(Video, st.just(2), st.just(1), st.integers(1, 2))
    text = st.builds(Text, st.integers(1, 4))
    return st.tuples(text, st.lists(st.one_of(text, image, video), max_size=2), text).map(lambda t: [t[0], *t[1], t[2]])


liking = st.lists(st.sampled_from([-9, 0, 0, 0, 9]), min_size=EXPERTS, max_size=EXPERTS)
some_case = st.builds(
    Case,
    sizes=st.sampled_from(MESHES),
    dispatch=st.sampled_from(["allgather", "all_to_all"]),
    k=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2, 4, 8]),
    rows=st.lists(documents(), min_size=ROWS, max_size=ROWS),
    liked=st.lists(liking, min_size=2, max_size=2),
)
ALL_TO_ONE = Case(
    (2, 1, 4, 1, 1), "all_to_all", 1, 8, [[Text(5), Image(1, 2), Text(3)], [Text(20)]] * 4, [[0] * 5 + [9, 0, 0], [9] + [0] * 7]
)
"""Every token to one expert of one of four devices, which must take them all; the seven others are empty."""


@functools.cache
def described(k: int) -> dict[str, Any]:
    text = {"num_experts_per_tok": k, "num_hidden_layers": 2}
    return tiny.variant(training.SMALL, text_config=text, vision_config={"depth": 1, "deepstack_visual_indexes": [0]})


def make_batch(case: Case, groups: int) -> Batch:
    config = described(case.k)
    inputs = cases.build(config, case.rows, seed=1)
    rows = ROWS // groups
    return Batch.from_hf(
        Qwen3VLMoeConfig.from_hf(config),
        **inputs,
        labels=cases.shifted_labels(inputs, config),
        groups=groups,
        text_length=LENGTH,
        vision_rows=rows,
        row_patches=PATCHES,
    )


def run(case: Case, mesh: Any) -> tuple[dict[str, np.ndarray], Any]:
    """`(gradients with the loss among them, router sums)`."""
    config = described(case.k)
    backend = BackendConfig(dispatch=case.dispatch, remat="full")  # pyright: ignore[reportArgumentType]
    model = ours.build_model(config, random_hf_tensors(config), backend)

    def objective(params: Any, bias: jax.Array, batch: Batch) -> Any:
        total, _, _, stats = forward_losses(model.with_params(params), batch, chunk_tokens=64, scale=1 / 100, router_bias=bias)
        routing = router_losses(stats, jnp.float32(100))
        return total + 0.1 * routing.aux + 0.1 * routing.z, stats

    def micro(constants: Any, batch: Batch) -> Any:
        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(*constants, batch)
        return grads, (loss, stats)

    params, bias = model.params(), jnp.asarray(case.liked, jnp.float32)
    batch = training.stacked([make_batch(case, 1 if mesh is None else case.groups)])
    if mesh is not None:
        params = jax.tree.map(jax.device_put, params, tree_shardings(params, mesh))
    batch = jax.tree.map(jnp.asarray, batch) if mesh is None else shard_batch(batch, mesh)
    step = jax.jit(functools.partial(accumulate, micro))
    grads, (loss, stats) = step.lower((params, bias), batch).compile(compiler_options=training.QUICK)((params, bias), batch)
    return {**{p: np.asarray(g) for p, g in flatten(grads).items()}, "loss": np.asarray(loss)}, jax.device_get(stats)


def check(case: Case, record: Any) -> None:
    expected, wanted = run(case, None)
    mesh = make_mesh(**dict(zip(AXES, case.sizes, strict=True)))  # pyright: ignore[reportArgumentType]
    with jax.set_mesh(mesh):
        found, stats = run(case, mesh)
    assert np.array_equal(stats.tokens_per_expert, wanted.tokens_per_expert), case
    scale = max(float(np.linalg.norm(g)) for g in expected.values())
    for path, grad in expected.items():
        # what no token reached has no gradient at all; of the rest, the smallest is rounded like the sums it comes from
        size = max(float(np.linalg.norm(grad)), 1e-4 * scale)
        error = float(np.linalg.norm(found[path] - grad)) / size
        record("any mesh, any routing: worst relative L2", error)
        assert error <= tolerances.GRADIENT, (case, path)


SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
SEARCH: dict[str, Any] = {"suppress_health_check": SLOW}


@pytest.mark.slow
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate], **SEARCH)
@given(case=some_case)
@example(case=ALL_TO_ONE)
def test_some_meshes(case: Case, record: Any) -> None:
    check(case, record)


@pytest.mark.soak
@settings(max_examples=60, phases=[Phase.generate], **SEARCH)
@given(case=some_case)
def test_many_meshes(case: Case, record: Any) -> None:
    check(case, record)
