"""Products with sharded weights, their collectives stated: gather the weight over FSDP, reduce-scatter its gradient.

Left to the partitioner, a gradient is all-reduced whole and then cut (13 GB more on the wire per step of the 30B). Inside
`jax.shard_map`, `all_gather` transposes to the reduce-scatter it should be. Only the FSDP axes are gathered; `tensor` stays
split, and a product that contracts it is summed over it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.quantised import Held, QuantisedWeight
from qvlmoe_jax.sharding import BATCH, FSDP, PICTURES, active_mesh, axes_in, axes_of, fit, partition_spec

LANES, TILE_BYTES = 128, 32
"""A TPU's tile: columns, and the bytes that its rows of one column take (8 of float32, 16 of bfloat16)."""


def fsdp_axes(entry: Any) -> tuple[str, ...]:
    """Those of them that are there to save memory, and are gathered before use."""
    return tuple(axis for axis in axes_of(entry) if axis in FSDP)


def gather_dim(w: jax.Array, dim: int, axis: str) -> jax.Array:
    """`w` with one dim gathered over a mesh axis; inside `shard_map`. The gradient is reduce-scattered.

    Shards that do not fill the TPU's tiles along that dim are gathered side by side, in a dim of their own: scattered as rows of
    one array, the TPU compiler all-reduces most such gradients whole (24 rows of each expert, 18 of a matrix; libtpu 0.0.50). It
    may lay any dim of a matrix along lanes, and of a larger array whose last dim does not fill them. Shards of fewer rows than a
    tile has it may lay with the rows of one device in front of the devices, and all-reduces them too: they are cut into as
    many rows as a tile has. The gather itself compiles to the same instruction.
    """
    rows = TILE_BYTES // w.dtype.itemsize
    as_rows = w.ndim > 2 and dim < w.ndim - 1 and w.shape[-1] % LANES == 0
    if w.shape[dim] % (rows if as_rows else LANES) == 0:
        return jax.lax.all_gather(w, axis, axis=dim, tiled=True)
    shard = w.reshape(rows, -1) if dim == 0 and w.shape[0] < rows and w.size % rows == 0 else w
    return jax.lax.all_gather(shard, axis, axis=dim).reshape(*w.shape[:dim], -1, *w.shape[dim + 1 :])


def gather(w: jax.Array, spec: P) -> jax.Array:
    """`w` with its FSDP axes gathered; inside `shard_map`. The gradient is reduce-scattered.

    One axis after the other, the minor one first: the bytes are those of one gather over both, which the TPU compiler would turn
    into an all-reduce of twice the bytes (libtpu 0.0.50). And with the gathered dim in front: scattered along lanes that a shard
    does not fill (18 of 128), it all-reduces too.
    """
    for dim, entry in enumerate(spec):
        if axes := fsdp_axes(entry):
            w = jnp.moveaxis(w, dim, 0)
            for axis in reversed(axes):
                w = gather_dim(w, 0, axis)
            w = jnp.moveaxis(w, 0, dim)
    return w


def _met_by(w: jax.Array, spec: P, other: P) -> jax.Array:
    """`w` of this spec as varying over the axes of `other` too: its gradient is summed over them when it is scattered, not while
    it is whole; inside `shard_map`."""
    axes = set(axes_in(*other)) - set(axes_in(*spec))
    return jax.lax.pcast(w, tuple(sorted(axes)), to="varying") if axes else w


def _rows_cover(rows: Any, spec: P, mesh: Any) -> bool:
    """Whether the rows are split over every axis the weight is gathered over: else each copy would do the same work."""
    return {axis for entry in spec for axis in fsdp_axes(entry)} <= set(axes_of(rows)) and mesh.size > 1


def placed_einsum(equation: str, x: jax.Array, w: jax.Array | QuantisedWeight, place: str, product: Any) -> jax.Array:
    """`product(equation, x, w)` with the weight of the sharding table's path `place`. A quantised one is gathered as it is held.

    Dim 0 of x is spread as rows of text are where there is a dim T, else as rows of patches; a dim T as text columns, and a dim
    that the table splits over `tensor` likewise.
    A weight over four times as long as x has rows (a decoding step) is left to the partitioner: moving x and partial sums of the
    product is then cheaper than gathering w.
    """
    mesh = active_mesh()
    inputs, output = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    if mesh is None or 4 * math.prod(x.shape[:2]) < w.shape[0]:
        return product(equation, x, w[...])
    if x_letters.startswith("..."):
        lead = "RP"[: x.ndim - len(x_letters) + 3]
        x_letters, output = x_letters.replace("...", lead), output.replace("...", lead)
        equation = f"{x_letters},{w_letters}->{output}"
    w_spec = partition_spec(place, w.shape, mesh)
    tensor = {letter: "tensor" for letter, entry in zip(w_letters, w_spec, strict=True) if "tensor" in axes_of(entry)}
    split = {x_letters[0]: BATCH if "T" in x_letters else PICTURES, "T": "context", **tensor}
    x_spec = fit([split.get(letter) for letter in x_letters], x.shape, mesh)
    if not _rows_cover(x_spec[0], w_spec, mesh):
        return product(equation, x, w[...])
    held = Held.of(w, place, mesh)
    specs = held.specs(place, mesh)
    of = {**dict(zip(x_letters, x_spec, strict=True)), **tensor}
    contracted = any(letter not in output for letter in tensor)

    def local(x: jax.Array, held: Held) -> jax.Array:
        parts = (gather(_met_by(part, spec, x_spec), spec) for part, spec in zip(held.parts, specs.parts, strict=True))
        y = product(equation, x, held.expand(*parts))
        return jax.lax.psum(y, "tensor") if contracted else y

    return jax.shard_map(local, in_specs=(x_spec, specs), out_specs=P(*(of.get(letter) for letter in output)))(x, held)


def placed_lookup(table_VD: jax.Array, ids_BT: jax.Array, place: str) -> jax.Array:
    """`table[ids]`, `[B,T,...,D]`: each device looks up its own ids in the gathered table.

    Over `tensor` the vocabulary stays split: a device answers for its part and the parts are summed.
    """
    mesh = active_mesh()

    def plain(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.take(table, ids, axis=0, mode="clip")

    if mesh is None or ids_BT.ndim < 2:
        return plain(table_VD, ids_BT)
    spec = partition_spec(place, table_VD.shape, mesh)
    ids_spec = fit((BATCH, "context") if place.startswith("embed") else (PICTURES, None), ids_BT.shape[:2], mesh)
    # Gathering the table costs its V rows; a lookup of fewer ids (a decoding step) is cheaper as the partitioner does it.
    if not _rows_cover(ids_spec[0], spec, mesh) or math.prod(ids_BT.shape[:2]) < table_VD.shape[0] // 8:
        return plain(table_VD, ids_BT)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        table = gather(_met_by(table, spec, ids_spec), spec)
        if "tensor" not in axes_of(spec[0]):
            return plain(table, ids)
        own = ids - jax.lax.axis_index("tensor") * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        return jax.lax.psum(jnp.where(here[..., None], plain(table, own), 0), "tensor")

    rest = (None,) * (ids_BT.ndim - 2)
    return jax.shard_map(local, in_specs=(spec, P(*ids_spec, *rest)), out_specs=P(*ids_spec, *rest, None))(table_VD, ids_BT)
