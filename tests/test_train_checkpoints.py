"""Which checkpoints of a run stay, and that a state comes back as it was."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax.param_tree import nest
from train.checkpoints import Checkpoints
from train.config import CheckpointConfig, OptimizerConfig
from train.errors import TrainingError
from train.optim import make_optimizer
from train.state import TrainState, init_state


def small_state(optimizer: Any = "adamw", freeze: tuple[str, ...] = ()) -> TrainState:
    params = {"lm_head/weight": jnp.ones((3, 5)), "language_model/layers/mlp/experts/down_proj": jnp.ones((2, 3, 4, 6))}
    return init_state(nest(params), make_optimizer(OptimizerConfig(name=optimizer)), freeze=freeze, compute_dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("validation_loss", [3.0, 1.0, 2.0, 2.5], [2, 4]),
        ("exact_match", [0.1, 0.2, 0.9, 0.3], [3, 4]),
        ("exact_match", [0.1, None, 0.05, None], [1, 4]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, metric: Any, values: list[float | None], kept: list[int]) -> None:
    state = small_state()
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, best=1, best_metric=metric)) as checkpoints:
        for step, value in enumerate(values, start=1):
            checkpoints.save(step, state, {"data": [{"position": step}]}, None if value is None else {metric: value})
    assert Checkpoints(tmp_path, CheckpointConfig()).steps() == kept


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "lion"])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    like = small_state(optimizer, freeze=("lm_head/.*",))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 9, a.shape)).astype(a.dtype), like)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(7, state, {"data": [{"position": 3}]})
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore(like)
    assert restored is not None
    found, loop = restored
    assert loop == {"data": [{"position": 3}]}
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def test_no_checkpoint_and_another_optimizers(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, CheckpointConfig()).restore(small_state()) is None
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, small_state(), {"data": [{}]})
    for other in (small_state("lion"), small_state(freeze=("lm_head/.*",))):
        with pytest.raises(TrainingError, match="arrays are not this config's, first "):
            Checkpoints(tmp_path, CheckpointConfig()).restore(other)
    assert Checkpoints(tmp_path, CheckpointConfig()).steps() == [1]  # it was not taken for damaged


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    state = small_state()
    large = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(0).normal(size=(300, 300))) if a.ndim > 1 else a, state)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(TrainingError, match=r"^the checkpoint of step 2 was not written \(.*; once .* goes on from step 1$"):
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            checkpoints.save(1, state, {"data": [{}]})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))  # Python ignores the signal: the write fails
            try:
                checkpoints.save(2, large, {"data": [{}]})
                checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Checkpoints(tmp_path, CheckpointConfig()).steps() == [1]
