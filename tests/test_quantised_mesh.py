"""Quantised weights on meshes: gathered as they are held, and the product is one device's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.collectives import placed_einsum
from qvlmoe_jax.config import Qwen3VLMoeTextConfig
from qvlmoe_jax.layers import Linear, einsum
from qvlmoe_jax.lora import Quantization, linear_dims
from qvlmoe_jax.moe import EXPERTS, Qwen3VLMoeTextSparseMoeBlock
from qvlmoe_jax.quantise import codes_of, quantised_bytes, scales_of
from qvlmoe_jax.quantised import QuantisedWeight
from qvlmoe_jax.sharding import BATCH, fit, make_mesh, partition_spec
from tests import tolerances
from tests.test_collectives import by_mesh, normal
from train import hlo

PRODUCTS = {  # equation, inputs, weight, place; 512 inputs are eight blocks, a head of 96 one and a half
    "q_proj": ("BTD,DNH->BTNH", (8, 64, 512), (512, 4, 6), "layers/self_attn/q_proj/weight"),
    "o_proj": ("BTNH,NHD->BTD", (8, 8, 4, 96), (4, 96, 16), "layers/self_attn/o_proj/weight"),
    "down_proj": ("BTF,FD->BTD", (8, 64, 192), (192, 16), "layers/mlp/down_proj/weight"),
}


def quantised(kind: Quantization, shape: tuple[int, ...], place: str) -> Any:
    dims = linear_dims(f"model/language_model/{place}")
    assert dims is not None
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scales = scales_of(kind, values, dims)
    weight: Any = QuantisedWeight(kind, shape, dims, jnp.float32)
    weight.codes, weight.scales = nnx.Param(jnp.asarray(codes_of(kind, values, scales, dims))), nnx.Param(jnp.asarray(scales))
    return weight


@by_mesh
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_agree(sizes: dict[str, Any], kind: Quantization, name: str) -> None:
    equation, inputs, shape, place = PRODUCTS[name]
    weight = quantised(kind, shape, place)
    assert weight.shape == shape

    def product_and_gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x: placed_einsum(equation, x, weight, place, einsum), x)
        return y, pullback(dy)[0]

    x = normal(1, *inputs)
    arguments = x, normal(2, *einsum(equation, x, weight[...]).shape)
    expected = jax.jit(product_and_gradient)(*arguments)
    with jax.set_mesh(make_mesh(**sizes)):
        found = jax.jit(product_and_gradient)(*arguments)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=tolerances.MODULE, atol=tolerances.MODULE * float(jnp.max(jnp.abs(a))))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_and_scales_are_what_is_gathered(kind: Quantization) -> None:
    equation, inputs, shape, place = PRODUCTS["q_proj"]
    weight = quantised(kind, shape, place)
    sizes = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}
    mesh = make_mesh(fsdp=4, expert=2)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(inputs), NamedSharding(mesh, fit((BATCH, None, None), inputs, mesh)))
        for part in (weight.codes, weight.scales):
            part[...] = jax.device_put(part[...], NamedSharding(mesh, partition_spec(place, part[...].shape, mesh)))
        step = jax.jit(lambda x, weight: placed_einsum(equation, x, weight, place, einsum))
        text = step.lower(x, weight).compile().as_text() or ""
    moved = hlo.collectives(text, sizes)
    dims = linear_dims(f"model/language_model/{place}")
    assert dims is not None
    scales = 4 * 4 * 6 if kind == "int8" else 0  # one for each output, which every device has
    assert {one.kind for one in moved} == {"all-gather"}
    assert sum(one.wire_bytes for one in moved) == (quantised_bytes(kind, shape, dims) - scales) * 7 / 8


@pytest.mark.parametrize("dispatch", ["allgather", "all_to_all"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_experts_are_gathered_as_codes_and_scales(kind: Quantization, dispatch: Any) -> None:
    """Over fsdp; the same numbers as on one device, and no other all-gather of their size."""
    E, D, F = 4, 512, 256
    config = Qwen3VLMoeTextConfig(64, D, F, 1, 4, 2, 32, num_experts=E, num_experts_per_tok=2, moe_intermediate_size=F)
    backend = BackendConfig(dispatch=dispatch, experts="tiles")
    block = Qwen3VLMoeTextSparseMoeBlock(config, backend=backend, dtype=jnp.float32, rngs=nnx.Rngs(0))
    shapes = {"gate_up_proj": (E, D, 2, F), "down_proj": (E, F, D)}
    for name, shape in shapes.items():
        setattr(block.experts, name, quantised(kind, shape, EXPERTS + name))
    x, valid = normal(1, 8, 8, D), jnp.ones((8, 8), bool)
    expected = jax.jit(lambda block, x: block(x, valid)[0])(block, x)
    mesh = make_mesh(fsdp=4, expert=2)
    with jax.set_mesh(mesh):
        for name in shapes:
            weight = getattr(block.experts, name)
            for part in (weight.codes, weight.scales):
                part[...] = jax.device_put(part[...], NamedSharding(mesh, partition_spec(EXPERTS + name, part[...].shape, mesh)))
        program = jax.jit(lambda block, x: block(x, valid)[0]).lower(block, x).compile()
        found = program(block, x)
    tolerance = tolerances.MODULE * float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, rtol=tolerances.MODULE, atol=tolerance)
    moved = hlo.collectives(program.as_text() or "", {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1})
    weights = [getattr(block.experts, name) for name in shapes]
    held = sum(part[...].nbytes for weight in weights for part in (weight.codes, weight.scales))
    sent = sum(one.wire_bytes for one in moved if one.axes == ("fsdp",))
    assert sent == pytest.approx(held / 2 * 3 / 4, rel=0.05)  # an axis of four, half of the experts


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_linear_is_gathered_once_forward_and_once_backward(recomputed: bool) -> None:
    """In stacked layers that the backward pass recomputes, and in those that it does not."""
    equation, inputs, shape, place = PRODUCTS["q_proj"]
    linear = Linear(equation, shape, init=nnx.initializers.zeros, dtype=jnp.float32, rngs=nnx.Rngs(0), place=place)
    linear.weight = quantised("nf4", shape, place)
    linear.weight.recomputed = recomputed
    mesh = make_mesh(fsdp=8)

    def loss(x: jax.Array, layers: Linear) -> jax.Array:
        def layer(x: jax.Array, linear: Linear) -> tuple[jax.Array, None]:
            return x + jnp.sum(jnp.sin(linear(x)), axis=(2, 3))[..., None], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False) if recomputed else layer, x, layers)[0])

    def placed(part: jax.Array) -> jax.Array:
        return jax.device_put(jnp.stack([part] * 3), NamedSharding(mesh, P(None, *partition_spec(place, part.shape, mesh))))

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(inputs), NamedSharding(mesh, fit((BATCH, None, None), inputs, mesh)))
        text = jax.jit(jax.grad(loss)).lower(x, jax.tree.map(placed, linear)).compile().as_text() or ""
    moved = hlo.collectives(text, {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1})
    held = linear.weight.codes[...].nbytes + linear.weight.scales[...].nbytes
    assert sum(one.wire_bytes for one in moved if one.kind == "all-gather") == 3 * 2 * held * 7 / 8
