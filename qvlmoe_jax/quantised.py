"""A weight held in 8 or 4 bits inside a model, and expanded where it is used (see `quantise` for the numbers)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qvlmoe_jax.lora import Quantization
from qvlmoe_jax.quantise import BLOCK, NF4, quantised_shapes
from qvlmoe_jax.sharding import axes_of, partition_spec


class QuantisedWeight(nnx.Module):
    """Stands where an `nnx.Param` stood: `weight[...]` is the expanded array. Frozen; what uses it is `forgetful`.

    Attributes:
      codes, scales: as `quantise` makes them, with the stacking dims of the weight in front.
      dtype: of the expanded weight.
      recomputed: whether the backward pass expands it again anyway, since it recomputes the layer around it.
    """

    def __init__(
        self, kind: Quantization, shape: tuple[int, ...], dims: tuple[int, int], dtype: DTypeLike, *, recomputed: bool = False
    ):
        """Abstract: `with_params` fills it."""
        codes, scales = quantised_shapes(kind, shape, dims)
        self.kind, self.num_outputs, self.dtype, self.recomputed = kind, dims[1], jnp.dtype(dtype), recomputed
        self.size = shape[len(shape) - dims[1] - 1]
        self.codes = nnx.Param(jax.ShapeDtypeStruct(codes, jnp.int8 if kind == "int8" else jnp.uint8))
        self.scales = nnx.Param(jax.ShapeDtypeStruct(scales, jnp.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the expanded weight."""
        codes = self.codes[...].shape
        return (*codes[: self.packed], self.size, *codes[self.packed + 1 :])

    @property
    def packed(self) -> int:
        """The last input dim, along which blocks lie and codes share bytes."""
        return self.codes[...].ndim - self.num_outputs - 1

    def __getitem__(self, _: Any) -> jax.Array:
        return self.expand(self.codes[...], self.scales[...])

    def expand(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weight of these codes and scales, or the part of it that they are: any, if the dim `packed` is whole."""
        if self.kind == "int8":
            return (codes.astype(jnp.float32) * scales).astype(self.dtype)
        last = self.packed
        shape = [*codes.shape[:last], -1, *codes.shape[last + 1 :]]
        numbers = jnp.stack([codes & 15, codes >> 4], axis=last + 1).reshape(shape)
        # a chain of selects, which every compiler fuses; a gather from 16 numbers is slow on TPU
        values = jnp.full(numbers.shape, NF4[0])
        for number, value in enumerate(NF4[1:], 1):
            values = jnp.where(numbers == number, value, values)
        blocks = jnp.broadcast_to(
            jnp.expand_dims(scales, last + 1), (*scales.shape[: last + 1], BLOCK, *scales.shape[last + 1 :])
        )
        values, blocks = (jax.lax.slice_in_dim(a, 0, self.size, axis=last) for a in (values, blocks.reshape(shape)))
        return (values * blocks).astype(self.dtype)


def forgetful(f: Callable[..., Any], weight: nnx.Param | QuantisedWeight) -> Callable[..., Any]:
    """`f`, which takes `weight` as an argument or in one. A quantised one is expanded again in the backward pass: kept, there
    would be one of full size per layer."""
    return jax.checkpoint(f) if isinstance(weight, QuantisedWeight) and not weight.recomputed else f


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """A weight in the parts that devices hold and send: the array itself, or a quantised one's codes and scales.

    Attributes:
      parts: the arrays, or anything that there is one of for each.
      expand: makes the weight of them.
    """

    parts: tuple[Any, ...]
    expand: Callable[..., jax.Array] = field(metadata={"static": True})

    @classmethod
    def of(cls, weight: jax.Array | nnx.Param | QuantisedWeight, place: str, mesh: Any | None) -> Held:
        """A weight of the sharding table's path `place`. A quantised one is expanded here where there is no mesh, and where its
        blocks lie along a dim that is split over `tensor`: a device may hold parts of them."""
        if isinstance(weight, QuantisedWeight) and mesh is not None:
            if "tensor" not in axes_of(partition_spec(place, weight.shape, mesh)[weight.packed]):
                return cls((weight.codes[...], weight.scales[...]), weight.expand)
        return cls((weight[...],), _as_it_is)

    def specs(self, place: str, mesh: Any) -> Held:
        """Each part's PartitionSpec."""
        return dataclasses.replace(self, parts=tuple(partition_spec(place, part.shape, mesh) for part in self.parts))


def _as_it_is(weight: jax.Array) -> jax.Array:
    return weight
