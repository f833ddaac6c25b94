"""Gradients of accumulated microbatches: summed where they lie, and over the `data` axis once for all of them.

`data` replicates the parameters, so a gradient there is a sum over devices that could be formed at any time. Left to the
partitioner it is formed in every microbatch; here each `data` shard accumulates its own share inside a `shard_map` over that
axis, and the shares are summed after the last microbatch. The other axes stay the partitioner's and the layers' own.

A accumulated microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qvlmoe_jax import Batch
from qvlmoe_jax.collectives import axes_of
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.sharding import active_mesh, batch_specs, constrain, table_row
from qvlmoe_jax.turns import together

Micro = Callable[[Any, Batch], tuple[Any, Any]]
"""`(constants, microbatch) -> (gradients, sums)`, both to be added up."""


def pinned(grads: dict[str, Any]) -> dict[str, Any]:
    """Gradients out of scan and checkpoint can lose their fsdp axis; the table says where they live."""
    return nest({path: constrain(leaf, *table_row(path)) for path, leaf in flatten(grads).items()})


def settled(grads: dict[str, Any]) -> dict[str, Any]:
    """What reduces gradients further waits for all of them (`qvlmoe_jax.turns`)."""
    return nest(together(flatten(grads)))


def accumulate(micro: Micro, constants: Any, batch: Batch) -> tuple[Any, Any]:
    """The sums of `micro` over all microbatches of `batch` `[A,...]`, gradients in float32 and sharded as the table says.

    Args:
      micro: sees one data shard's rows alone, and returns its share of the gradients and sums.
      constants: arrays that are the same for every microbatch.
    """

    def one(constants: Any, microbatch: Batch) -> tuple[Any, Any]:
        grads, sums = micro(constants, microbatch)
        return settled(pinned(jax.tree.map(lambda g: g.astype(jnp.float32), grads))), sums

    def own(constants: Any, batch: Batch) -> tuple[Any, Any]:
        first = jax.tree.map(lambda a: a[0], batch)
        if batch.input_ids.shape[0] == 1:
            return one(constants, first)

        def add(carry: Any, microbatch: Batch) -> tuple[Any, None]:
            grads, sums = jax.tree.map(jnp.add, carry, one(constants, microbatch))
            return (pinned(grads), sums), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, constants, first))
        return jax.lax.scan(add, (pinned(zeros[0]), zeros[1]), batch)[0]

    over_data = _data_specs(batch)
    if over_data is None:
        return own(constants, batch)
    return jax.shard_map(
        lambda *a: jax.lax.psum(own(*a), "data"),
        in_specs=(P(), over_data),
        out_specs=P(),
        axis_names={"data"},
        check_vma=False,
    )(constants, batch)


def _data_specs(batch: Batch) -> Any | None:
    """How the batch is split over `data` alone; None when it is not, or not all of it."""
    mesh = active_mesh()
    if mesh is None:
        return None
    specs = jax.tree.map(lambda spec: P(*("data" if "data" in axes_of(dim) else None for dim in spec)), batch_specs(batch, mesh))
    return specs if all("data" in spec for spec in jax.tree.leaves(specs)) else None
