"""The small parts every room uses: linear maps as einsums, the two norms, embeddings, and stacking layers for a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qvlmoe_jax.collectives import placed_einsum, placed_lookup
from qvlmoe_jax.quantised import QuantisedWeight, forgetful

Init = Callable[..., jax.Array]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

LAYER_NORM_EPS = 1e-6


def truncated_normal(std: float, cut: float) -> Init:
    """Normal of this standard deviation, redrawn outside +-`cut` (absolute, as `torch.nn.init.trunc_normal_`'s a and b)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return (std * jax.random.truncated_normal(key, -cut / std, cut / std, shape, jnp.float32)).astype(dtype)

    return init


def exact(x: jax.Array) -> jax.lax.Precision | None:
    """The precision of a product with x: float32 ones stay float32 on TPU and GPU, whose default would round them."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum` in the inputs' dtype, float32 exact."""
    return jnp.einsum(equation, x, w, precision=exact(x))


def float32_einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum` of inputs of any float dtype, summed and returned in float32."""
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`; the activation is evaluated in float32 and rounded once, as torch does it in bf16."""
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
    """GELU, by tanh or exact, evaluated in float32 and rounded once, as torch does it in bf16."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=approximate).astype(x.dtype)


class Linear(nnx.Module):
    """`einsum(equation, x, weight) (+ bias)`. The weight is `[in..., out...]`; the bias has the output's own letters.

    `place` is the weight's path in the sharding table: the product's collectives are then stated (`collectives`). With an
    adapter (`adapters.adapt`) `lora_scale * (x lora_A) lora_B` is added; `weight` may then be a `QuantisedWeight`.
    """

    weight: nnx.Param | QuantisedWeight
    lora_A: nnx.Param | None
    lora_B: nnx.Param | None

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        *,
        init: Init,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        place: str | None = None,
    ):
        operands, output = equation.split("->")
        letters = operands.split(",")[1]
        self.equation, self.place = equation, place
        self.weight = nnx.Param(init(rngs.params(), shape, dtype))
        out_shape = tuple(size for letter, size in zip(letters, shape, strict=True) if letter in output)
        self.bias = nnx.Param(jnp.zeros(out_shape, dtype)) if use_bias else None
        self.lora_A = self.lora_B = None
        self.lora_scale = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        product = forgetful(lambda x, weight: self._product(self.equation, x, weight, "weight"), self.weight)
        y = product(x, self.weight)
        y = y if self.bias is None else y + self.bias[...]
        return y if self.lora_A is None else y + self._low_rank(x)

    def _product(self, equation: str, x: jax.Array, weight: jax.Array | QuantisedWeight, name: str) -> jax.Array:
        if self.place is None:
            return einsum(equation, x, weight[...])
        return placed_einsum(equation, x, weight, self.place.removesuffix("weight") + name, einsum)

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """`scale (x A) B`; r stands for the rank in the equations."""
        assert self.lora_A is not None and self.lora_B is not None
        operands, output = self.equation.split("->")
        x_letters, letters = operands.split(",")
        inputs = "".join(letter for letter in letters if letter not in output)
        middle = "".join(letter for letter in x_letters if letter not in inputs) + "r"
        low = self._product(f"{x_letters},{inputs}r->{middle}", x, self.lora_A[...], "lora_A")
        outputs = letters.removeprefix(inputs)
        return self._product(f"{middle},r{outputs}->{output}", self.lora_scale * low, self.lora_B[...], "lora_B")


class Embed(nnx.Module):
    """A table `[V, D]`; calling it looks rows up. `place`: see `Linear`."""

    def __init__(
        self, shape: tuple[int, int], *, init: Init, dtype: DTypeLike, rngs: nnx.Rngs, place: str = "embed_tokens/weight"
    ):
        self.place = place
        self.weight = nnx.Param(init(rngs.params(), shape, dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return placed_lookup(self.weight[...], ids, self.place)


def _mean(x: jax.Array) -> jax.Array:
    """Over the last dim, which stays as 1.

    XLA:CPU makes a norm part of the product after it, sums included, and takes those again for every piece of the product: 4096
    rows then take up to twice as long. A choice is what it leaves out; this one chooses between equals.
    """
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return jnp.where(jnp.isnan(mean), jnp.nan, mean)


def _on_rows(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`f(x)`, which treats all of the last dim alike, without x's other dims of 1: before a dim of 4096 XLA:CPU takes the sums of
    the backward pass twenty times as long for them."""
    ones = [i for i, size in enumerate(x.shape[:-1]) if size == 1]
    return jnp.expand_dims(f(jnp.squeeze(x, ones)), ones)


class RMSNorm(nnx.Module):
    """float32 statistics, cast to the input's dtype, THEN the weight (MOE 74-80: the order matters in bf16)."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return _on_rows(self._of_rows, x)

    def _of_rows(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(_mean(jnp.square(x32)) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` with eps 1e-6: statistics and affine map in float32, one cast at the end."""

    def __init__(self, width: int, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _on_rows(self._of_rows, x)

    def _of_rows(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - _mean(x32)
        normed = centred * jax.lax.rsqrt(_mean(jnp.square(centred)) + LAYER_NORM_EPS)
        return (normed * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], ModuleT], count: int, rngs: nnx.Rngs) -> ModuleT:
    """`count` layers as ONE module whose parameters have a leading dim of `count`: what `lax.scan` iterates over."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)
