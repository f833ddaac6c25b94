"""TrainState: everything a step changes and a checkpoint keeps, as one pytree; and where each leaf of it lives on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import partition_spec
from train.optim import join, split_frozen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """
    Attributes:
      step: int32, how many batches were consumed (skipped ones too).
      params: the trained parameters, nested dicts, master precision. frozen: the others, in the compute dtype.
      opt_state: the optimizer's, over `params` alone.
      router_bias: `[L_moe,E]` float32, moved by the experts' loads (`train/router.py`); None = off.
      rng: the run's key, as uint32 data; a step that needs randomness folds its number in.
      bad_steps: int32, non-finite steps skipped so far. bad_in_a_row: those since the last good one.
    """

    step: jax.Array
    params: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    router_bias: jax.Array | None
    rng: jax.Array
    bad_steps: jax.Array
    bad_in_a_row: jax.Array


def init_state(
    params: Mapping[str, Any],
    tx: optax.GradientTransformation,
    *,
    freeze: tuple[str, ...] = (),
    param_dtype: Any = jnp.float32,
    compute_dtype: Any = jnp.float32,
    router_bias: tuple[int, int] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state at step 0 around `params` (taken over: their buffers may be reused). `router_bias`: its shape; None = off."""
    trained, frozen = split_frozen(params, freeze)

    def make(trained: Any, frozen: Any) -> TrainState:
        trained = jax.tree.map(lambda p: p.astype(param_dtype), trained)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=trained,
            frozen=jax.tree.map(lambda p: p.astype(compute_dtype), frozen),
            opt_state=tx.init(trained),
            router_bias=None if router_bias is None else jnp.zeros(router_bias, jnp.float32),
            rng=jax.random.key_data(jax.random.key(seed)),
            bad_steps=zero,
            bad_in_a_row=zero,
        )

    # The moments' sharding is pinned: left to itself, jit may replicate them.
    shardings = None if mesh is None else state_shardings(jax.eval_shape(make, trained, frozen), mesh)
    return jax.jit(make, out_shardings=shardings)(trained, frozen)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """A NamedSharding for every leaf, from the one table: what has a parameter's path and shape is sharded as it is.

    Factored moments (adafactor) and counters have no parameter's shape and are replicated.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(join(state.params, state.frozen)).items()}

    def place(key_path: Any, leaf: Any) -> NamedSharding:
        keys = [str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey)]
        # the optimizer may hold dicts of its own around the parameter's path
        path = next((p for i in range(len(keys)) if (p := "/".join(keys[i:])) in shapes), None)
        same = path is not None and tuple(leaf.shape) == tuple(shapes[path])
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh) if same and path else P())

    return jax.tree_util.tree_map_with_path(place, state)


def all_params(state: TrainState) -> dict[str, Any]:
    """The whole parameter tree, trained and frozen."""
    return join(state.params, state.frozen)
