"""One order for a program's collectives on CPU devices.

XLA:CPU starts collectives in the program's order, but may start the next one while a loop or conditional before it still has
collectives to run, on one device and not on another. All collectives of `jax.shard_map` answer to one id, so devices then meet
in different ones: wrong numbers, "Id can't be larger than the number of participating threads", or a standstill (jaxlib 0.10.2).
Only what needs another's result surely comes after it, so here things are made to need one another: weights are held until the
activations they meet are there, and the gradients of those activations until the weights' gradients are.

Accelerators run a program in one order anyway; for them, and without a mesh, nothing here does anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.sharding import active_mesh, batch_specs, fit, on_cpus, partition_spec

T = TypeVar("T")
Spec = Sequence[Any]
_LOOP = re.compile(r"(.*/)?(visual|layers(/\d+)?)/")
"""The parameters of one loop have this in common."""


def _cpu_mesh() -> Any | None:
    """The active mesh if it is one of several CPU devices."""
    mesh = active_mesh()
    return mesh if mesh is not None and mesh.size > 1 and on_cpus(mesh) else None


def _there(until: Sequence[jax.Array]) -> jax.Array:
    """True, once all of `until` is computed; nothing that a compiler can work out beforehand, and true of NaN as well."""
    first = [a.reshape(-1)[0].astype(jnp.float32) for a in until]
    return jnp.all(jnp.stack([(v == v) | jnp.isnan(v) for v in first]))


def _held(tree: T, until: Any, tree_specs: Any, until_specs: Any) -> T:
    """`tree`, once `until` is there: on every device its own part of both.

    Args:
      tree_specs, until_specs: how their arrays are sharded, a fitted PartitionSpec for each leaf.
    """
    leaves, structure = jax.tree.flatten(tree)
    which = [i for i, a in enumerate(leaves) if a.dtype != jax.dtypes.float0]
    waits = [
        (a, spec)
        for a, spec in zip(jax.tree.leaves(until), jax.tree.leaves(until_specs), strict=True)
        if a.dtype != jax.dtypes.float0 and a.size
    ]
    if not which or not waits:
        return tree
    specs = jax.tree.leaves(tree_specs)

    def local(own: list[jax.Array], until: list[jax.Array]) -> list[jax.Array]:
        there = _there(until)
        return [jnp.where(there, a, jnp.zeros((), a.dtype)) for a in own]

    placed = [specs[i] for i in which]
    done = jax.shard_map(local, in_specs=(placed, [spec for _, spec in waits]), out_specs=placed, check_vma=False)(
        [leaves[i] for i in which], [a for a, _ in waits]
    )
    for i, a in zip(which, done, strict=True):
        leaves[i] = a
    return jax.tree.unflatten(structure, leaves)


def _in_turn(first: Any, then: Any, first_specs: Any, then_specs: Any) -> tuple[Any, Any]:
    """`(first, then)`, with `then` held until `first` is there, and the gradient of `first` until that of `then` is."""

    @jax.custom_vjp
    def turned(first: Any, then: Any) -> tuple[Any, Any]:
        return first, _held(then, first, then_specs, first_specs)

    def backward(_: None, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
        return _held(gradients[0], gradients[1], first_specs, then_specs), gradients[1]

    turned.defvjp(lambda first, then: (turned(first, then), None), backward)
    return turned(first, then)


def weights_in_turn(x: jax.Array, module: T, prefix: str, x_spec: Spec) -> tuple[jax.Array, T]:
    """Activations, then the module whose weights meet them; its gradients, then that of the activations.

    Args:
      prefix: the module's place in the sharding table. x_spec: as `constrain` takes it.
    """
    if (mesh := _cpu_mesh()) is None:
        return x, module
    specs = jax.tree_util.tree_map_with_path(
        lambda path, a: partition_spec("/".join([prefix, *(key.name for key in path[:-1])]), a.shape, mesh), module
    )
    return _in_turn(x, module, fit(x_spec, x.shape, mesh), specs)


def in_turn(first: T, then: jax.Array, first_spec: Spec, then_spec: Spec) -> tuple[T, jax.Array]:
    """Arrays of one spec, then another array; its gradient, then theirs. Specs as `constrain` takes them."""
    if (mesh := _cpu_mesh()) is None:
        return first, then
    first_specs = jax.tree.map(lambda a: fit(first_spec, a.shape, mesh), first)
    return _in_turn(first, then, first_specs, fit(then_spec, then.shape, mesh))


def after(array: jax.Array, until: jax.Array, spec: Spec, until_spec: Spec) -> jax.Array:
    """`array`, once `until` is there. No order for gradients."""
    if (mesh := _cpu_mesh()) is None:
        return array
    return _held(array, until, fit(spec, array.shape, mesh), fit(until_spec, until.shape, mesh))


def batch_after(batch: T, scalars: Sequence[jax.Array]) -> T:
    """A Batch, once numbers that every device has are there."""
    if (mesh := _cpu_mesh()) is None:
        return batch
    return _held(batch, list(scalars), batch_specs(batch, mesh), [P()] * len(scalars))


def together(grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradients by their parameters' paths, each once those that come out of loops are there: the tower's and the layers'.

    (One gradient of each loop: its others come with it, and XLA repeats what it reads of them in every use.)
    """
    if (mesh := _cpu_mesh()) is None:
        return grads
    specs = {path: partition_spec(path, a.shape, mesh) for path, a in grads.items()}
    one_of = {found[0]: path for path in grads if (found := _LOOP.match(path))}
    return _held(grads, [grads[path] for path in one_of.values()], specs, [specs[path] for path in one_of.values()])
