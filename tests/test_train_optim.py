"""Optimizers on stacked arrays: each layer and expert is treated as if it were alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.hf import param_shapes
from qvlmoe_jax.param_tree import flatten, nest
from tests import tiny
from train.config import OptimizerConfig
from train.optim import decays, make_optimizer, muon_dims
from train.state import init_state

PARAMS = {
    "language_model/layers/self_attn/q_proj/weight": (3, 16, 4, 6),
    "language_model/layers/self_attn/o_proj/weight": (3, 4, 6, 16),
    "language_model/layers/mlp/experts/gate_up_proj": (3, 5, 16, 2, 7),
    "language_model/layers/mlp/experts/down_proj": (3, 5, 7, 16),
    "language_model/layers/input_layernorm/weight": (3, 16),
    "language_model/embed_tokens/weight": (40, 16),
    "visual/blocks/attn/qkv/weight": (2, 12, 3, 4, 5),
}


def random_tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for path, shape in PARAMS.items()})


def directions(config: OptimizerConfig, steps: int) -> dict[str, Any]:
    """The last direction of `steps` random gradients at fixed parameters."""
    tx, params = make_optimizer(config), random_tree(0)
    state = tx.init(params)
    direction: Any = {}
    for step in range(steps):
        direction, state = tx.update(random_tree(step + 1), state, params)
    return flatten(direction)


def alone(matrices: list[jax.Array]) -> jax.Array:
    """optax's own 2-D Muon over the gradients of one matrix, last direction."""
    tx = optax.contrib.muon(1.0, consistent_rms=0.2)
    params = {"w": jnp.zeros_like(matrices[0])}
    state = tx.init(params)
    updates: Any = params
    for gradient in matrices:
        updates, state = tx.update({"w": gradient}, state, params)
    return -updates["w"]


def test_muon_orthogonalises_each_matrix_of_a_stack_alone(record: Any) -> None:
    found = directions(OptimizerConfig(name="muon"), steps=3)
    gradients = [flatten(random_tree(step + 1)) for step in range(3)]
    cases = {  # path -> (one matrix of the stack, as it is stored; that matrix as [in, out])
        "language_model/layers/self_attn/q_proj/weight": (lambda a: a[1], (16, 24)),
        "language_model/layers/self_attn/o_proj/weight": (lambda a: a[2], (24, 16)),
        "language_model/layers/mlp/experts/gate_up_proj": (lambda a: a[1, 3, :, 0], (16, 7)),
        "language_model/layers/mlp/experts/down_proj": (lambda a: a[0, 4], (7, 16)),
        "visual/blocks/attn/qkv/weight": (lambda a: a[1, :, 2], (12, 20)),
    }
    for path, (pick, shape) in cases.items():
        expected = alone([pick(gradient[path]).reshape(shape) for gradient in gradients])
        error = float(jnp.abs(pick(found[path]).reshape(shape) - expected).max())
        record("muon on a stack against one matrix alone", error)
        assert error < 1e-4 * float(jnp.abs(expected).max()), path
        singular = np.linalg.svd(np.asarray(expected), compute_uv=False)
        assert singular.max() / singular.min() < 2.5  # Newton-Schulz leaves them between about 0.7 and 1.2
    adam = directions(OptimizerConfig(name="adamw"), steps=3)
    for path in ("language_model/embed_tokens/weight", "language_model/layers/input_layernorm/weight"):
        assert np.allclose(found[path], adam[path], rtol=1e-5), path


def test_lion_is_the_sign_of_the_interpolated_momentum() -> None:
    found = directions(OptimizerConfig(name="lion", b1=0.8, b2=0.9, weight_decay=0.5), steps=2)
    path = "language_model/layers/mlp/experts/down_proj"
    first, second, value = (np.asarray(flatten(random_tree(seed))[path]) for seed in (1, 2, 0))
    momentum = 0.1 * first
    assert np.allclose(found[path], np.sign(0.8 * momentum + 0.2 * second) + 0.5 * value, atol=1e-6)


def test_adafactor_keeps_sums_of_rows_and_columns() -> None:
    shape = (2, 4, 256, 2, 192)
    params = nest({"language_model/layers/mlp/experts/gate_up_proj": jnp.ones(shape)})
    factored = make_optimizer(OptimizerConfig(name="adafactor")).init(params)
    full = make_optimizer(OptimizerConfig(name="adamw")).init(params)

    def size(state: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert size(factored) < size(full) / 100
    direction = directions(OptimizerConfig(name="adafactor"), steps=2)
    for path, leaf in direction.items():  # gradients of size 0.1 become directions of size about one
        assert 0.3 < float(jnp.sqrt(jnp.mean(leaf**2))) < 1.5, path


def test_adafactor_clips_each_matrix_of_a_stack_alone() -> None:
    """One expert of one layer has a gradient that jumps: every update is that of the matrix alone, the others' untouched."""
    path, shape = "language_model/layers/mlp/experts/down_proj", (4, 3, 130, 160)
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for _ in range(3)]
    gradients[2] = gradients[2].at[1, 2].multiply(100)

    def last(gradients: list[jax.Array], tx: Any, path: str) -> jax.Array:
        params = nest({path: jnp.zeros_like(gradients[0])})
        state, update = tx.init(params), params
        for gradient in gradients:
            update, state = tx.update(nest({path: gradient}), state, params)
        return flatten(update)[path]

    found = last(gradients, make_optimizer(OptimizerConfig(name="adafactor")), path)
    single = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    for layer, expert in ((0, 0), (1, 1), (1, 2), (3, 2)):
        expected = last([gradient[layer, expert] for gradient in gradients], single, "w")
        assert np.allclose(found[layer, expert], expected, rtol=1e-5, atol=1e-6), (layer, expert)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_weight_decay_is_decoupled_and_leaves_norms_alone(name: Any) -> None:
    plain, decayed = (directions(OptimizerConfig(name=name, weight_decay=w), steps=2) for w in (0.0, 0.5))
    values = flatten(random_tree(0))
    for path in PARAMS:
        expected = 0 if "norm" in path else 0.5 * values[path]
        assert np.allclose(decayed[path] - plain[path], expected, atol=1e-6), path


def test_what_decays_and_what_muon_takes_in_a_whole_model() -> None:
    for config in (tiny.TINY, tiny.DENSE):
        shapes = param_shapes(Qwen3VLMoeConfig.from_hf(config))
        tree = nest({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})
        decayed, dims = flatten(decays(tree)), flatten(muon_dims(tree))
        for path, shape in shapes.items():
            scale_or_bias = path.endswith("bias") or "norm" in path
            assert decayed[path] != scale_or_bias, path
            other = any(part in path for part in ("embed_tokens", "lm_head", "pos_embed", "patch_embed", "mlp/gate/"))
            assert (dims[path] is None) == (scale_or_bias or other), path
            if dims[path] is not None:
                axes = (*dims[path].reduction_axis, *dims[path].output_axis)
                assert len(set(axes)) == len(axes) and all(0 <= axis < len(shape) for axis in axes), path


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_the_first_moment_in_bf16(name: Any) -> None:
    tx = make_optimizer(OptimizerConfig(name=name, b1=0.9, moment_dtype="bfloat16"))
    state = init_state(random_tree(0), tx)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert dtypes.count(jnp.dtype("bfloat16")) == len(PARAMS)
