"""Products, lookups and losses whose collectives are stated: the same numbers on every mesh, and no all-reduce
where a reduce-scatter would do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax import Qwen3VLMoeConfig, spread
from qvlmoe_jax.attention import attention
from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.collectives import gather_dim, placed_einsum, placed_lookup
from qvlmoe_jax.layers import einsum
from qvlmoe_jax.moe import Qwen3VLMoeTextSparseMoeBlock
from qvlmoe_jax.sharding import BATCH, fit, make_mesh, partition_spec
from tests import tiny, tolerances
from train import hlo, topology
from train.loss import training_loss

MESHES = [
    {"fsdp": 4, "expert": 2},
    {"tensor": 2, "fsdp": 2, "expert": 2},
    {"tensor": 2, "context": 2, "fsdp": 2},
    {"data": 2, "context": 4},
]
by_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "_".join(f"{a}{n}" for a, n in sizes.items()))
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 8)))
"""Of a vocabulary whose shards have odd sizes."""
ATTENTION = "BTD,DNH->BTNH", (16, 4, 6), "layers/self_attn/q_proj/weight"
OUTPUT = "BTNH,NHD->BTD", (4, 6, 16), "layers/self_attn/o_proj/weight"
MERGER = "...D,DF->...F", (16, 24), "merger/linear_fc1/weight"


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def compare(f: Callable[..., jax.Array], sizes: dict[str, Any], *arguments: jax.Array) -> None:
    """Value and gradients of `f`, projected on a random direction, with and without the mesh."""

    def scalar(*arguments: jax.Array) -> jax.Array:
        y = f(*arguments)
        return jnp.sum(y * normal(9, *y.shape))

    gradient = jax.value_and_grad(scalar, tuple(range(len(arguments))))
    expected = jax.jit(gradient)(*arguments)
    with jax.set_mesh(make_mesh(**sizes)):
        found = jax.jit(gradient)(*arguments)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerances.MODULE, atol=tolerances.MODULE * float(jnp.max(jnp.abs(a))))


@by_mesh
@pytest.mark.parametrize("equation, shape, place", [ATTENTION, OUTPUT, MERGER], ids=["q_proj", "o_proj", "merger"])
def test_products_agree(sizes: dict[str, Any], equation: str, shape: tuple[int, ...], place: str) -> None:
    inputs = (8, 8, 4, 6) if equation.startswith("BTNH") else (8, 8, 16)
    compare(lambda x, w: placed_einsum(equation, x, w, place, einsum), sizes, normal(0, *inputs), normal(1, *shape))


@by_mesh
def test_lookups_agree(sizes: dict[str, Any]) -> None:
    compare(lambda table: placed_lookup(table, IDS, "embed_tokens/weight"), sizes, normal(1, 40, 6))


@by_mesh
@pytest.mark.parametrize("chunk", [3, 1000])
def test_losses_agree(sizes: dict[str, Any], chunk: int) -> None:
    targets = jnp.asarray(np.random.default_rng(0).integers(-5, 32, (8, 8)))
    targets = jnp.where(targets < 0, -100, targets)

    def both(hidden: jax.Array, head: jax.Array) -> jax.Array:
        """The losses, which have no gradient, and a total that stands for a part of what is minimised."""
        total, losses = training_loss(hidden, head, targets, 0.3, z_loss=0.1, chunk_tokens=chunk)
        values = jnp.stack([losses.cross_entropy, losses.log_z_squared, losses.correct])
        return jnp.append(values.reshape(-1), total)

    compare(both, sizes, normal(0, 8, 8, 6), normal(1, 6, 32))


def sent(f: Callable[..., jax.Array], place: str, w: jax.Array, *inputs: jax.Array) -> dict[str, float]:
    """Bytes on the wire for the gradient of `w` over fsdp 4 x expert 2, by kind of collective."""
    sizes = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}
    mesh = make_mesh(fsdp=4, expert=2)
    with jax.set_mesh(mesh):
        placed = NamedSharding(mesh, partition_spec(place, w.shape, mesh))
        given = [jax.device_put(x, NamedSharding(mesh, fit((BATCH, *[None] * (x.ndim - 1)), x.shape, mesh))) for x in inputs]
        step = jax.jit(jax.grad(lambda w, *x: jnp.sum(f(w, *x) ** 2)), out_shardings=placed)
        text = step.lower(jax.device_put(w, placed), *given).compile().as_text() or ""
    moved: dict[str, float] = {}
    for one in hlo.collectives(text, sizes):
        moved[one.kind] = moved.get(one.kind, 0) + one.wire_bytes
    return moved


def gathered_and_scattered(size: int) -> dict[str, float]:
    """The least for so many float32 weights: 7/8 of them there, 7/8 of their gradients back."""
    return {"all-gather": 4 * size * 7 / 8, "reduce-scatter": 4 * size * 7 / 8}


def of_product(product: Callable[..., jax.Array]) -> dict[str, float]:
    equation, shape, place = ATTENTION
    return sent(lambda w, x: product(equation, x, w), place, normal(1, *shape), normal(0, 8, 8, 16))


def test_gradients_are_reduce_scattered() -> None:
    found = of_product(lambda equation, x, w: placed_einsum(equation, x, w, ATTENTION[2], einsum))
    assert found == gathered_and_scattered(16 * 4 * 6)


@pytest.mark.parametrize("place", ["embed_tokens/weight", "lm_head/weight"])
def test_gradients_of_odd_vocabularies_are_reduce_scattered(place: str) -> None:
    expected = gathered_and_scattered(40 * 6)
    if place.startswith("embed"):
        found = sent(lambda table, ids: placed_lookup(table, ids, place), place, normal(1, 40, 6), IDS)
    else:

        def cross_entropy(head: jax.Array, hidden: jax.Array, ids: jax.Array) -> jax.Array:
            return training_loss(hidden, head, ids, chunk_tokens=1000)[0]

        found = sent(cross_entropy, place, normal(1, 6, 40), normal(0, 8, 8, 6), IDS)
        expected["all-reduce"] = 4 * 2 * 7 / 8  # the total, one float32
    assert found == expected


# The shards of the 235B on 64 x 8 devices: 24 rows of each expert, 8 of the router (a tile has 16), 18 and 9 of the tower's
# matrices, and 64 that fill tiles.
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, dim", [((16, 1536, 256), 1), ((16, 4096, 256), 1), ((512, 128), 0), ((1152, 4304), 0), ((576, 4608), 0)]
)
def test_the_tpu_compiler_reduce_scatters_shards_of_any_height(shape: tuple[int, ...], dim: int) -> None:
    if reason := topology.missing():
        pytest.skip(f"no TPU compiler here: {reason}")
    sizes = {"data": 1, "fsdp": 64, "expert": 2, "tensor": 1, "context": 1}
    mesh = make_mesh(fsdp=64, expert=2, devices=topology.open_devices(topology.Topology.parse("v5p:4x4x8")))
    spec = P(*("fsdp" if i == dim else None for i in range(len(shape))))

    def gradient(x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        product = jax.vjp(lambda w: x @ gather_dim(w, dim, "fsdp").reshape(-1, shape[-1]), w)[1]
        return product(y)[0]

    rows = NamedSharding(mesh, P(("fsdp", "expert")))
    step = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(rows.spec, rows.spec, spec), out_specs=spec, check_vma=False))
    x, y = (jax.ShapeDtypeStruct((128 * 512, n), jnp.bfloat16, sharding=rows) for n in (math.prod(shape[:-1]), shape[-1]))
    text = step.lower(x, y, jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))).compile().as_text()
    kinds = {one.kind for one in hlo.collectives(text or "", sizes)}
    assert "reduce-scatter" in kinds and "all-reduce" not in kinds


def test_the_partitioner_alone_all_reduces() -> None:
    """Why the collectives are stated: without that, this would be the program."""
    assert of_product(einsum)["all-reduce"] > 0


@pytest.mark.parametrize("limit", [0, spread.WHOLE_HEAD], ids=["cut", "whole"])
@pytest.mark.parametrize("sizes", [{"context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=["context", "all three"])
def test_gradients_of_keys_are_reduce_scattered(sizes: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of both lengths: the same numbers, and no all-reduce over context."""
    monkeypatch.setattr(spread, "WHOLE_HEAD", limit)
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 4, axis=1))

    backend = BackendConfig(attention="chunked", attention_chunk=4)

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, segment_ids=segments, causal=True, backend=backend)

    arrays = normal(0, 2, 16, 4, 8), normal(1, 2, 16, 2, 8), normal(2, 2, 16, 2, 8)
    compare(f, sizes, *arrays)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = [NamedSharding(mesh, fit((BATCH, "context", "tensor", None), a.shape, mesh)) for a in arrays]
        step = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) ** 2), (1, 2)), out_shardings=(placed[1], placed[2]))
        text = step.lower(*map(jax.device_put, arrays, placed)).compile().as_text() or ""
    axes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1, **sizes}
    found = hlo.collectives(text, axes)
    assert {one.kind for one in found} == {"all-gather", "reduce-scatter"}
    shards = sum(a.nbytes for a in arrays[1:]) / mesh.size
    assert sum(one.wire_bytes for one in found if one.kind == "reduce-scatter") == shards * (sizes["context"] - 1)


def test_a_decoding_step_is_left_to_the_partitioner() -> None:
    equation, _, place = ATTENTION
    with jax.set_mesh(make_mesh(fsdp=8)):
        step = jax.jit(lambda x, w: placed_einsum(equation, x, w, place, einsum))
        assert "shard_map" not in str(step.trace(normal(0, 8, 1, 64), normal(1, 64, 4, 6)).jaxpr)
        assert "shard_map" in str(step.trace(normal(0, 8, 2, 64), normal(1, 64, 4, 6)).jaxpr)


def test_a_weight_somewhat_longer_than_its_rows_is_gathered() -> None:
    """The mergers of a few small pictures: 64 rows meet 192 of the weight."""
    equation, _, place = MERGER
    found = sent(lambda w, x: placed_einsum(equation, x, w, place, einsum), place, normal(1, 192, 192), normal(0, 8, 8, 192))
    assert found.keys() == {"all-gather", "reduce-scatter"}, found


def test_partial_sums_of_experts_are_of_a_devices_own_tokens() -> None:
    """Forward, the cotangent, and the gradient of the input: each of a quarter of the tokens that the expert axis gathers."""
    config = Qwen3VLMoeConfig.from_hf(tiny.TINY).text_config
    block = Qwen3VLMoeTextSparseMoeBlock(config, backend=BackendConfig(experts="tiles"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(0, 8, 16, config.hidden_size)
    sizes: dict[str, Any] = {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2, "context": 1}
    with jax.set_mesh(mesh := make_mesh(**sizes)):
        placed = jax.device_put(x, NamedSharding(mesh, P(BATCH)))
        step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.square(block(x, jnp.ones(x.shape[:2], bool))[0]))))
        found = hlo.collectives(step.lower(placed).compile().as_text() or "", sizes)
    summed = sum(one.wire_bytes for one in found if one.axes == ("tensor",))
    assert summed == pytest.approx(3 * x.nbytes / 4, rel=0.1), found
