"""Where every array lives on a device mesh: five axes, ONE table of parameter path -> PartitionSpec, and `constrain`.

Axes (all of them always exist; unused ones have size 1): `data` replicates parameters, `fsdp` shards them, `expert` spreads
the experts, `tensor` splits heads / F / vocabulary, `context` splits the sequence. Batch rows go over data, fsdp and expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")
PICTURES = (*BATCH, "context")  # rows of patches: the tower would do the same work on every device of `context`
# Parameters other than the experts have no expert dim; there the expert axis is one more axis of FSDP.
FSDP = ("fsdp", "expert")
VOCAB = ("tensor", "fsdp", "expert")

# Path pattern -> spec over the TRAILING dims (stacking dims in front are never sharded). Patterns are matched whole and are
# disjoint: a leaf that hits no row, or two, is an error.
TABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # The vocabulary dim, not D: a table sharded over D is rematerialised whole at the gather.
    (r"(.*/)?embed_tokens/weight", (VOCAB, None)),
    (r"(.*/)?lm_head/weight", (None, VOCAB)),
    (r"(.*/)?layers(/\d+)?/self_attn/[qkv]_proj/weight", (FSDP, "tensor", None)),
    (r"(.*/)?layers(/\d+)?/self_attn/o_proj/weight", ("tensor", None, FSDP)),
    (r"(.*/)?layers(/\d+)?/self_attn/[qk]_norm/weight", (None,)),
    (r"(.*/)?layers(/\d+)?/(input|post_attention)_layernorm/weight", (None,)),
    (r"(.*/)?layers(/\d+)?/mlp/gate/weight", (FSDP, None)),
    (r"(.*/)?layers(/\d+)?/mlp/experts/gate_up_proj", ("expert", "fsdp", None, "tensor")),
    (r"(.*/)?layers(/\d+)?/mlp/experts/down_proj", ("expert", "tensor", "fsdp")),
    (r"(.*/)?layers(/\d+)?/mlp/(gate|up)_proj/weight", (FSDP, "tensor")),
    (r"(.*/)?layers(/\d+)?/mlp/down_proj/weight", ("tensor", FSDP)),
    (r"(.*/)?language_model/norm/weight", (None,)),
    (r"(.*/)?patch_embed/proj/weight", (None, FSDP)),
    (r"(.*/)?pos_embed/weight", (None, FSDP)),
    (r"(.*/)?patch_embed/proj/bias", (None,)),
    (r"(.*/)?blocks/attn/qkv/weight", (FSDP, None, "tensor", None)),
    (r"(.*/)?blocks/attn/qkv/bias", (None, "tensor", None)),
    (r"(.*/)?blocks/attn/proj/weight", ("tensor", None, FSDP)),
    (r"(.*/)?blocks/attn/proj/bias", (None,)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc1/weight", (FSDP, "tensor")),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc1/bias", ("tensor",)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc2/weight", ("tensor", FSDP)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc2/bias", (None,)),
    (r"(.*/)?(blocks/norm[12]|merger/norm|deepstack_merger_list/norm)/(weight|bias)", (None,)),
)
_COMPILED = tuple((re.compile(pattern), spec) for pattern, spec in TABLE)


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

    Dropping is what the design asks for: kv heads that `tensor` does not divide are replicated over it.
    """
    sizes = dict(mesh.shape)
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


def table_row(path: str) -> tuple[Any, ...]:
    """The spec over trailing dims of the one table row that `path` (keys joined by '/') hits.

    Raises:
      KeyError: no row, or more than one, matches: the table and the tree have drifted apart.
    """
    hits = [spec for pattern, spec in _COMPILED if pattern.fullmatch(path)]
    if len(hits) != 1:
        raise KeyError(f"parameter {path!r} hits {len(hits)} rows of the sharding table, expected exactly one")
    return hits[0]


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


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """NamedShardings of a Batch's leaves: text rows and vision groups over (data, fsdp, expert), text columns over context.

    Each leaf (array or ShapeDtypeStruct) may have an accumulation axis in front, which is not sharded.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, fit(_BATCH_SPECS[path[-1].name], np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(place, batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host Batch on the mesh, by `batch_shardings`."""
    return jax.tree.map(jax.device_put, batch, batch_shardings(batch, mesh))
