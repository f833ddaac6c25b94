"""The sharding table on the real trees, and one answer whatever the mesh."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax import Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, hf, turns
from qvlmoe_jax.lora import PARTS, LoraConfig, adapter_shapes
from qvlmoe_jax.model import gather_visual
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import AXES, BATCH, TABLE, fit, make_mesh, partition_spec, shard_batch, table_row, tree_shardings
from tests import cases, hub_configs, ours, tiny, tolerances
from tests.collective_order import loose
from tests.hf_checkpoints import random_hf_tensors

REAL = {"30b": hub_configs.HUB_30B, "235b": hub_configs.HUB_235B}
COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")
MESHES = [
    {"fsdp": 8},
    {"expert": 8},
    {"tensor": 2, "fsdp": 4},
    {"context": 2, "expert": 4},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"tensor": 2, "context": 2, "expert": 2},
]


def _name(sizes: dict[str, Any]) -> str:
    return "_".join(f"{axis}{n}" for axis, n in sizes.items())


@pytest.mark.parametrize("name", [*REAL, "4b"])
def test_every_leaf_hits_one_row(name: str) -> None:
    config = REAL.get(name, hub_configs.HUB_4B)
    for path, shape in hf.param_shapes(Qwen3VLMoeConfig.from_hf(config)).items():
        assert len(table_row(path)) <= len(shape)


def test_every_row_is_hit() -> None:
    configs = (hub_configs.HUB_30B, hub_configs.HUB_4B)
    adapters = LoraConfig(targets=tuple(PARTS))
    paths = [path for config in configs for path in hf.param_shapes(Qwen3VLMoeConfig.from_hf(config))]
    paths += [path for config in configs for path in adapter_shapes(Qwen3VLMoeConfig.from_hf(config), adapters)]
    assert all(table_row(path) for path in paths)
    for pattern, _ in TABLE:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


def test_a_stranger_is_refused() -> None:
    with pytest.raises(KeyError, match="hits 0 rows"):
        table_row("model/language_model/layers/self_attn/z_proj/weight")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "axis, size", [("fsdp", 8), ("expert", 8), ("tensor", 2), ("tensor", 4), ("tensor", 8), ("data", 8), ("context", 8)]
)
def test_each_axis_alone_shards_the_real_trees(name: str, axis: str, size: int) -> None:
    sizes: dict[str, Any] = {axis: size}
    mesh = make_mesh(**sizes)
    whole = part = 0
    for path, shape in hf.param_shapes(Qwen3VLMoeConfig.from_hf(REAL[name])).items():
        spec = partition_spec(path, shape, mesh)
        local = NamedSharding(mesh, spec).shard_shape(shape)  # raises where an axis does not divide its dim
        if re.search(r"[kv]_proj", path) and axis == "tensor":
            # kv heads: sharded where the 4 of them divide, replicated otherwise
            assert spec[-2] == ("tensor" if 4 % size == 0 else None)
            continue
        whole += math.prod(shape)
        part += math.prod(local)
        if "experts" in path and axis in ("fsdp", "expert", "tensor"):
            assert math.prod(local) * size == math.prod(shape), path
    if axis in ("data", "context"):
        assert part == whole  # these two replicate parameters
    else:
        assert part * size <= 1.01 * whole


def test_fit_drops_what_does_not_divide() -> None:
    mesh = make_mesh(fsdp=2, expert=4)
    assert fit((BATCH, None), (8, 3), mesh) == P(("fsdp", "expert"), None)
    assert fit((BATCH, None), (2, 3), mesh) == P("fsdp", None)
    assert fit((BATCH, None), (4, 3), mesh) == P("fsdp", None)
    assert fit(("tensor",), (5, 8), mesh) == P(None, None)


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fsdp=4, tensor=4 needs 16 devices, 8 are here"):
        make_mesh(fsdp=4, tensor=4)


def _eight_rows(config: tiny.ConfigDict, *, groups: int = 1) -> Batch:
    """Eight rows: a picture, two pictures, a video, text only, of different lengths, padded on the left."""
    text, image, video = cases.Text, cases.Image, cases.Video
    rows = [
        [text(3), image(2, 3), text(4)],
        [text(9)],
        [image(1, 2), text(2), image(3, 2), text(3)],
        [text(2), video(2, 2, 2), text(2)],
    ]
    inputs = cases.build(config, rows * 2, padding="left")
    return Batch.from_hf(Qwen3VLMoeConfig.from_hf(config), **inputs, groups=groups)


@jax.jit
def _forward(model: Qwen3VLMoeForConditionalGeneration, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    out = model(batch, output_router_logits=True)
    return out.logits, out.aux_loss


@jax.jit
@jax.value_and_grad
def _loss(model: Qwen3VLMoeForConditionalGeneration, batch: Batch) -> jax.Array:
    out = model(batch, output_router_logits=True)
    log_probs = jax.nn.log_softmax(out.logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs[:, :-1], jnp.asarray(batch.input_ids)[:, 1:, None], axis=-1)[..., 0]
    weight = jnp.asarray(batch.segment_ids)[:, 1:] > 0
    aux = 0.0 if out.aux_loss is None else out.aux_loss
    return -jnp.sum(picked * weight) / jnp.sum(weight) + 0.01 * aux


def _on(mesh: jax.sharding.Mesh, model: Qwen3VLMoeForConditionalGeneration) -> Qwen3VLMoeForConditionalGeneration:
    params = model.params()
    return model.with_params(jax.tree.map(jax.device_put, params, tree_shardings(params, mesh)))


@pytest.fixture(scope="module")
def model() -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(tiny.TINY, random_hf_tensors(tiny.TINY))


@pytest.fixture(scope="module")
def one_device(model: Qwen3VLMoeForConditionalGeneration) -> tuple[np.ndarray, float]:
    logits, aux = _forward(model, _eight_rows(tiny.TINY))
    assert aux is not None
    return np.asarray(logits), float(aux)


def _agrees(
    sizes: dict[str, Any], model: Qwen3VLMoeForConditionalGeneration, groups: int, expected: tuple[np.ndarray, float]
) -> None:
    mesh = make_mesh(**sizes)
    batch = _eight_rows(tiny.TINY, groups=groups)
    with jax.set_mesh(mesh):
        logits, aux = _forward(_on(mesh, model), shard_batch(batch, mesh))
    assert len(logits.sharding.device_set) == math.prod(sizes.values())
    valid = batch.segment_ids > 0
    assert np.abs(np.asarray(logits) - expected[0])[valid].max() < tolerances.LOGITS
    assert abs(float(aux) - expected[1]) < tolerances.AUX_LOSS


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[3], MESHES[5]], ids=_name)
def test_forward_on_a_mesh_is_one_device(
    sizes: dict[str, Any], model: Qwen3VLMoeForConditionalGeneration, one_device: tuple[np.ndarray, float]
) -> None:
    _agrees(sizes, model, 8, one_device)


@pytest.mark.slow
@settings(max_examples=6)
@given(
    sizes=st.permutations([2, 2, 2, 1, 1]).map(lambda n: dict(zip(AXES, n, strict=True)))
    | st.sampled_from(AXES).map(lambda a: {a: 4}),
    groups=st.sampled_from([1, 2, 8]),
)
def test_two_shardings_one_answer(sizes: dict[str, Any], groups: int) -> None:
    """Any product of axes, pictures in one group or in many (hypothesis builds its own model: fixtures are not for it)."""
    model = ours.build_model(tiny.TINY, random_hf_tensors(tiny.TINY))
    logits, aux = _forward(model, _eight_rows(tiny.TINY))
    assert aux is not None
    _agrees(sizes, model, groups, (np.asarray(logits), float(aux)))


@pytest.mark.soak  # test_mesh_training has the training step's gradients on these meshes
@pytest.mark.parametrize("sizes", MESHES, ids=_name)
def test_gradients_on_a_mesh_are_one_devices(sizes: dict[str, Any], model: Qwen3VLMoeForConditionalGeneration) -> None:
    mesh = make_mesh(**sizes)
    loss, grads = _loss(model, _eight_rows(tiny.TINY))
    with jax.set_mesh(mesh):
        mesh_loss, mesh_grads = _loss(_on(mesh, model), shard_batch(_eight_rows(tiny.TINY, groups=8), mesh))
    assert float(mesh_loss) == pytest.approx(float(loss), rel=1e-5)
    expected, found = flatten(grads.params()), flatten(mesh_grads.params())
    for path in expected:
        a, b = np.asarray(expected[path]), np.asarray(found[path])
        assert np.linalg.norm(a - b) <= tolerances.GRADIENT * np.linalg.norm(a), path


@pytest.mark.slow
def test_initialisation_does_not_depend_on_the_mesh() -> None:
    config = Qwen3VLMoeConfig.from_hf(tiny.UNIFORM)
    plain = flatten(Qwen3VLMoeForConditionalGeneration.from_config(config, nnx.Rngs(3)).params())
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    sharded = flatten(Qwen3VLMoeForConditionalGeneration.from_config(config, nnx.Rngs(3), mesh=mesh).params())
    for path, leaf in sharded.items():
        assert leaf.sharding == NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)), path
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(plain[path]), atol=1e-6, err_msg=path)


def test_the_visual_gather_needs_no_collective() -> None:
    """Forward and backward, with groups on the batch shards of their text rows: nothing crosses a device."""
    mesh = make_mesh(fsdp=4, expert=2)
    sharding = NamedSharding(mesh, P(("fsdp", "expert")))
    features = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32, sharding=sharding)
    index = jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=sharding)
    cotangent = jax.ShapeDtypeStruct((16, 24, 32), jnp.float32, sharding=sharding)

    def both(features: jax.Array, index: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, pullback = jax.vjp(lambda f: gather_visual(f, index), features)
        return out, pullback(cotangent)[0]

    with jax.set_mesh(mesh):
        hlo = jax.jit(both, out_shardings=sharding).lower(features, index, cotangent).compile().as_text() or ""
    assert "scatter" in hlo and not COLLECTIVE.search(hlo), COLLECTIVE.findall(hlo)

    # the test would see one: features flattened over the groups are gathered whole
    def flattened(features: jax.Array, index: jax.Array) -> jax.Array:
        return features.reshape(-1, 32)[jnp.maximum(index, 0)]

    with jax.set_mesh(mesh):
        hlo = jax.jit(flattened, out_shardings=sharding).lower(features, index).compile().as_text() or ""
    assert COLLECTIVE.search(hlo)


def test_devices_run_the_forward_collectives_in_one_order(
    model: Qwen3VLMoeForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(fsdp=4)
    batch = shard_batch(_eight_rows(tiny.TINY, groups=2), mesh)

    def compiled() -> str:
        with jax.set_mesh(mesh):
            run = jax.jit(lambda model, batch: model(batch).logits)
            return run.lower(_on(mesh, model), batch).compile().as_text() or ""

    assert not loose(compiled())
    monkeypatch.setattr(turns, "_cpu_mesh", lambda: None)
    assert loose(compiled())  # what would be seen without


def test_a_text_only_batch_runs_on_a_mesh(model: Qwen3VLMoeForConditionalGeneration) -> None:
    config = Qwen3VLMoeConfig.from_hf(tiny.TINY)
    ids = np.arange(16).reshape(2, 8)
    expected = _forward(model, Batch.from_hf(config, input_ids=ids))[0]
    # the same rows with room for pictures that are not there: the tower is skipped, two rows do not divide the mesh
    batch = Batch.from_hf(config, input_ids=ids, vision_rows=2, row_patches=16)
    mesh = make_mesh(fsdp=4, expert=2)
    with jax.set_mesh(mesh):
        found = _forward(_on(mesh, model), shard_batch(batch, mesh))[0]
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() < tolerances.LOGITS
