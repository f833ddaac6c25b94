"""The compiled step's text on meshes of eight: what is reduced, how often, and what must not move at all (`train/hlo.py`)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvlmoe_jax import hf
from qvlmoe_jax.sharding import batch_shardings, make_mesh, partition_spec
from tests.collective_order import loose
from tests.test_plan import step_config
from train import aot, hlo
from train.config import TrainConfig
from train.config_tree import plain

REMATERIALISED = "Involuntary full rematerialization"
SMALL_BYTES = 4096
"""Scalars and the router's loads; every gradient of a matrix of the small model is larger."""


def compiled(
    config: TrainConfig, capfd: pytest.CaptureFixture[str], *, accumulation: int = 1
) -> tuple[aot.Program, list[hlo.Collective]]:
    """The step's program and collectives; the partitioner must not have said that it gave up on an array's sharding."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, accumulation=accumulation))
    sizes = plain(config.mesh)
    capfd.readouterr()
    program = aot.compile_step(config, make_mesh(**sizes), platform="cpu")
    assert REMATERIALISED not in capfd.readouterr().err
    return program, hlo.collectives(program.hlo, sizes)


def sent(found: list[hlo.Collective], *kinds: str, over: str | None = None) -> float:
    """Wire bytes of these kinds, of collectives whose groups run over the axis."""
    return sum(one.wire_bytes for one in found if (not kinds or one.kind in kinds) and (over is None or over in one.axes))


@pytest.mark.slow
def test_reductions_over_data_happen_once_and_over_fsdp_in_every_microbatch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], record: Any
) -> None:
    changes: dict[str, Any] = {"loss": {"aux_loss": 0.01, "router_z_loss": 0.001}, "router": {"bias_update_rate": 0.001}}
    config = step_config(tmp_path, {"data": 2, "fsdp": 2, "expert": 2}, **changes)
    program, one = compiled(config, capfd)
    _, three = compiled(config, capfd, accumulation=3)

    # Over data: every gradient, sharded as it is, once: an all-reduce of n bytes sends n on two devices.
    model = aot.model_config(config)
    mesh = make_mesh(**plain(config.mesh))
    shards = sum(
        4 * math.prod(NamedSharding(mesh, partition_spec(path, shape, mesh)).shard_shape(shape))
        for path, shape in hf.param_shapes(model).items()
    )
    for found in (one, three):
        record("bytes over data / bytes of the gradients' shards", sent(found, over="data") / shards)
        assert shards <= sent(found, over="data") <= 1.05 * shards
    repeated = [c for c in three if "data" in c.axes and c.times > 1]
    assert sum(c.wire_bytes for c in repeated) < SMALL_BYTES * 3, repeated
    # Over fsdp and expert: reduce-scattered in every microbatch, straight into the accumulator's shards.
    for axis in ("fsdp", "expert"):
        assert sent(three, "reduce-scatter", over=axis) == pytest.approx(3 * sent(one, "reduce-scatter", over=axis), rel=0.01)
        reduced = sum(c.wire_bytes for c in three if c.kind == "all-reduce" and axis in c.axes and "data" not in c.axes)
        assert reduced < 0.05 * sent(three, "reduce-scatter", over=axis)

    # Parameters and both moments, each on the shards the table gives; nothing is replicated that has a row with axes.
    assert program.memory["arguments"] < 1.02 * (3 * shards + batch_bytes(config, mesh))


def batch_bytes(config: TrainConfig, mesh: Any) -> float:
    batch = aot.abstract_batch(config, aot.model_config(config))
    leaves = zip(jax.tree.leaves(batch), jax.tree.leaves(batch_shardings(batch, mesh)), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


WIDE = {"text_config": {"moe_intermediate_size": 4096}}
"""Experts so wide that one layer's of them outweigh everything else that moves at once (on the CPU the stand-in for the ragged
all-to-all gathers every device's rows)."""


def largest(found: list[hlo.Collective]) -> float:
    return max(one.wire_bytes / one.times for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["allgather", "all_to_all"])
def test_experts_weights_do_not_move_under_expert_parallelism(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], dispatch: str
) -> None:
    config = step_config(tmp_path, {"expert": 8}, described=WIDE)
    config = dataclasses.replace(config, backend=dataclasses.replace(config.backend, dispatch=dispatch))  # pyright: ignore[reportArgumentType]
    text = aot.model_config(config).text_config
    _, found = compiled(config, capfd)
    one_of_three_matrices = 4 * text.num_experts * text.hidden_size * text.moe_intermediate_size * 7 / 8
    assert largest(found) < one_of_three_matrices
    if dispatch == "allgather":  # the same look sees them where they are gathered
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert=1, fsdp=8))
        assert largest(compiled(config, capfd)[1]) >= one_of_three_matrices


@pytest.mark.parametrize(
    "sizes, dispatch, accumulation",
    [
        pytest.param({"fsdp": 4, "expert": 2}, "allgather", 1, id="fsdp expert"),
        pytest.param({"tensor": 2, "context": 2, "expert": 2}, "allgather", 1, id="context", marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "expert": 2}, "all_to_all", 2, id="all_to_all", marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "fsdp": 4}, "allgather", 1, id="tensor", marks=pytest.mark.soak),
        pytest.param({"fsdp": 8}, "allgather", 1, id="fsdp", marks=pytest.mark.soak),
    ],
)
def test_devices_run_the_steps_collectives_in_one_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sizes: dict[str, int], dispatch: Any, accumulation: int
) -> None:
    config = step_config(tmp_path, sizes, loss={"aux_loss": 0.01, "router_z_loss": 0.001}, router={"bias_update_rate": 0.001})
    config = dataclasses.replace(config, backend=dataclasses.replace(config.backend, dispatch=dispatch))
    program, _ = compiled(config, capfd, accumulation=accumulation)
    assert not loose(program.hlo)


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [{"tensor": 2, "fsdp": 4}, {"tensor": 2, "context": 2, "expert": 2}], ids=["fsdp", "context"])
def test_the_partitioner_gives_up_on_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], sizes: dict[str, int]) -> None:
    """`compiled` looks for its warning; here on the axes the tests above leave out."""
    assert compiled(step_config(tmp_path, sizes), capfd)[1]


def test_the_partitioners_warning_is_seen_when_there_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)

    def moved(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(("tensor", "expert"), None, None)))
        return jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P(None, "tensor", None)))

    capfd.readouterr()
    jax.jit(moved).lower(jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)).compile()
    assert REMATERIALISED in capfd.readouterr().err
