"""Where every array lives on a device mesh: the table of `sharding_table` as PartitionSpecs, and `constrain`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.sharding_table import AXES, BATCH, FSDP, HIDDEN, PICTURES, TABLE, VOCAB, axes_in, axes_of, table_row

__all__ = [
    "AXES",
    "BATCH",
    "FSDP",
    "HIDDEN",
    "PICTURES",
    "TABLE",
    "VOCAB",
    "active_mesh",
    "axes_in",
    "axes_of",
    "batch_shardings",
    "constrain",
    "fit",
    "make_mesh",
    "on_cpus",
    "partition_spec",
    "shard_batch",
    "table_row",
    "tree_shardings",
]


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the five axes, in `AxisType.Auto` (the partitioner completes what the table and `constrain` state).

    Args:
      devices: which devices to use; None takes as many of `jax.devices()` as the sizes ask for.
    Raises:
      ConfigError: fewer devices than the product of the sizes.
    """
    shape = (data, fsdp, expert, tensor, context)
    wanted = math.prod(shape)
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < wanted:
        sizes = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True) if n > 1)
        raise ConfigError(f"a mesh of {sizes} needs {wanted} devices, {len(devices)} are here; lower one of the sizes")
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:wanted])
    except NotImplementedError:  # a TPU torus whose sides are not products of the sizes: 8 x 8 on 4 x 4 x 4 cuts a side in two
        grid = mesh_utils.create_device_mesh(shape, devices[:wanted], allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def fit(spec: Sequence[Any], shape: Sequence[int], mesh: Any) -> P:
    """`spec` over the trailing dims of `shape`, without the axes that are absent, of size 1, or do not divide their dim.

    Dropping is what the design asks for: kv heads that `tensor` does not divide are replicated over it. Inside a `shard_map`
    over some axes (`train/accumulate.py`) the shapes are already one shard's, and those axes are absent too.
    """
    manual = getattr(mesh, "manual_axes", ())
    sizes = {axis: n for axis, n in mesh.shape.items() if axis not in manual}
    dims: list[Any] = [None] * (len(shape) - len(spec))
    for size, entry in zip(shape[len(dims) :], spec, strict=True):
        kept, parts = [], 1
        for axis in () if entry is None else (entry,) if isinstance(entry, str) else entry:
            n = sizes.get(axis, 1)
            if n > 1 and size % (parts * n) == 0:
                kept.append(axis)
                parts *= n
        dims.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return P(*dims)


def partition_spec(path: str, shape: Sequence[int], mesh: Any) -> P:
    """The PartitionSpec of the parameter (or optimizer moment) at `path`, fitted to its shape and the mesh."""
    return fit(table_row(path), shape, mesh)


def tree_shardings(tree: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """NamedShardings for a pure dict tree of arrays or ShapeDtypeStructs, from the table."""

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {key: walk(value, f"{path}/{key}" if path else str(key)) for key, value in node.items()}
        return NamedSharding(mesh, partition_spec(path, node.shape, mesh))

    return walk(tree, "")


def active_mesh() -> Any | None:
    """The mesh set by `jax.set_mesh`, or None: everything builds and runs without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def on_cpus(mesh: Any | None) -> bool:
    """Whether a mesh's devices are CPUs: where the program will run, which need not be where it is traced."""
    device = None if mesh is None else mesh.abstract_device
    return device is not None and device.platform == "cpu"


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins `x`'s trailing dims to mesh axes under the active mesh; does nothing without one."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


_BATCH_SPECS = {  # Batch field -> spec over its trailing dims; an accumulation axis may come first
    **dict.fromkeys(("input_ids", "segment_ids", "visual_index", "labels"), (BATCH, "context")),
    "position_ids": (None, BATCH, "context"),
    "patch_segment_ids": (BATCH, None, None),
    **dict.fromkeys(("pixel_values", "patch_coords", "pos_index", "pos_weight"), (BATCH, None, None, None)),
}


def batch_specs(batch: Any, mesh: Any) -> Any:
    """PartitionSpecs of a Batch's leaves: text rows and vision groups over (data, fsdp, expert), text columns over context.

    Each leaf (array or ShapeDtypeStruct) may have an accumulation axis in front, which is not sharded.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fit(_BATCH_SPECS[path[-1].name], np.shape(leaf), mesh), batch)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """`batch_specs` as NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(batch, mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host Batch on the mesh, by `batch_shardings`."""
    return jax.tree.map(jax.device_put, batch, batch_shardings(batch, mesh))
