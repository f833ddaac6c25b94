"""The training step: what must not change the loss, what must not be in the program, what a bad batch must not do."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import make_mesh, partition_spec, shard_batch
from tests import cases, ours, tiny, tolerances, training
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig, ScheduleConfig
from train.loss import head_weight, next_tokens, training_loss
from train.optim import make_optimizer, schedule
from train.state import TrainState, all_params, init_state
from train.step import Step, forward_losses, make_train_step

SMALL = training.SMALL
DOCUMENTS = [
    [Text(4), Image(2, 3), Text(6)],
    [Text(11)],
    [Text(3), Video(2, 2, 2), Text(5)],
    [Image(1, 2), Text(7), Image(2, 2), Text(3)],
]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, clip_norm=1.0)
NO_LOSS_CHANGE = 1e-3
"""Relative change that a test of equality must see when the thing it tests is broken."""


@pytest.fixture(scope="module")
def model() -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(SMALL, random_hf_tensors(SMALL))


def fresh(model: Qwen3VLMoeForConditionalGeneration, optimizer: OptimizerConfig = OPTIMIZER, **options: Any) -> TrainState:
    return init_state(jax.tree.map(jnp.copy, model.params()), make_optimizer(optimizer), **options)


def make_step(model: Any, optimizer: OptimizerConfig = OPTIMIZER, **options: Any) -> Step:
    rate = schedule(ScheduleConfig(name="constant"), optimizer.learning_rate, 10)
    return make_train_step(model, make_optimizer(optimizer), rate, optimizer=optimizer, **options)


def compilations(step: Any) -> int:
    return step._cache_size()


@pytest.fixture(scope="module")
def plain_step(model: Any) -> Step:
    """The step without options; tests share its compilations."""
    return make_step(model)


def relative(a: Any, b: Any) -> float:
    return abs(float(a) - float(b)) / abs(float(b))


def packed(batch: Batch) -> Batch:
    """The rows of a Batch `[B,...]` (one vision group) as documents of a single row, as long as all of them."""

    def row(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[..., b, :][..., batch.segment_ids[b] > 0] for b in range(len(batch.segment_ids))], axis=-1)

    segments = np.repeat(np.arange(1, len(batch.segment_ids) + 1), (batch.segment_ids > 0).sum(1)).astype(np.int32)
    return dataclasses.replace(
        batch,
        input_ids=row(batch.input_ids)[None],
        position_ids=row(batch.position_ids)[:, None],
        visual_index=row(batch.visual_index)[None],
        labels=row(batch.labels)[None],
        segment_ids=segments[None],
    )


def test_packed_documents_have_their_own_losses(model: Any, record: Any) -> None:
    alone = training.labelled(SMALL, cases.build(SMALL, DOCUMENTS))
    together = packed(alone)
    losses_of = jax.jit(lambda m, b: forward_losses(m, jax.tree.map(jnp.asarray, b), chunk_tokens=32))
    _, losses, targets, _ = losses_of(model, alone)
    expected = np.asarray(losses.cross_entropy).sum(1)
    _, losses, packed_targets, _ = losses_of(model, together)
    found = np.array([np.asarray(losses.cross_entropy)[together.segment_ids == d].sum() for d in range(1, len(DOCUMENTS) + 1)])
    assert int((packed_targets >= 0).sum()) == int((targets >= 0).sum())
    error = float(np.max(np.abs(found - expected) / expected))
    record("packed against unpacked: relative loss of a document", error)
    assert error <= tolerances.SAME_LOSS
    _, leaking, _, _ = losses_of(model, dataclasses.replace(together, segment_ids=np.ones_like(together.segment_ids)))
    leaked = np.asarray(leaking.cross_entropy)[together.segment_ids == len(DOCUMENTS)].sum()
    assert relative(leaked, expected[-1]) > NO_LOSS_CHANGE  # documents that see each other would show


def joined(batch: Batch) -> Batch:
    """Microbatches `[A,B,...]` as one microbatch of A*B rows, whose vision groups are theirs."""

    def join(path: Any, leaf: np.ndarray) -> np.ndarray:
        if path[-1].name == "position_ids":
            return np.moveaxis(leaf, 0, 1).reshape(1, 3, -1, leaf.shape[-1])
        return leaf.reshape(1, -1, *leaf.shape[2:])

    return jax.tree_util.tree_map_with_path(join, batch)


def test_accumulating_four_is_one(model: Any, plain_step: Step, record: Any) -> None:
    four = training.mixed_batches(SMALL, 1, accumulation=4)[0]
    tokens = [
        int((np.asarray(next_tokens(jnp.asarray(four.labels[a]), jnp.asarray(four.segment_ids[a]))) >= 0).sum()) for a in range(4)
    ]
    assert len(set(tokens)) == 4  # otherwise a mean of means would pass
    once_state, once = plain_step(fresh(model), joined(four))
    state, accumulated = plain_step(fresh(model), four)
    for key in ("loss", "grad_norm", "accuracy"):
        error = relative(accumulated[key], once[key]) if float(once[key]) else abs(float(accumulated[key]))
        record(f"accumulation 4 against 1: relative {key}", error)
        assert error <= tolerances.SAME_LOSS, key
    assert int(accumulated["tokens"]) == sum(tokens)
    for path, leaf in flatten(once_state.opt_state[0].mu).items():  # the gradients, clipped and times 1 - b1
        other = flatten(state.opt_state[0].mu)[path]
        norm = float(jnp.linalg.norm(leaf))
        assert float(jnp.linalg.norm(leaf - other)) <= tolerances.GRADIENT * max(norm, 1e-6), path


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(model: Any, plain_step: Step, remat: Any, record: Any) -> None:
    batch = training.mixed_batches(SMALL, 1, accumulation=4)[0]
    tensors = random_hf_tensors(SMALL)
    _, plain = plain_step(fresh(model), batch)
    other = ours.build_model(SMALL, tensors, BackendConfig(remat=remat))
    _, recomputed = make_step(other)(fresh(other), batch)
    for key in ("loss", "grad_norm"):
        record(f"remat against none: relative {key}", relative(recomputed[key], plain[key]))
        assert relative(recomputed[key], plain[key]) <= tolerances.SAME_LOSS


V = 50


def hidden_head_targets() -> tuple[jax.Array, jax.Array, jax.Array]:
    B, T, D = 3, 23, 8
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), -V // 4, V)  # a fifth of them ignored
    targets = targets.at[0].set(jnp.argmax(hidden[0] @ head, axis=-1))  # and a third foreseen
    return hidden, head, jnp.where(targets < 0, -100, targets)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 64, 1000])
def test_chunked_loss_is_the_plain_one(chunk_tokens: int, z_loss: float, record: Any) -> None:
    hidden, head, targets = hidden_head_targets()
    here = targets >= 0

    def plain(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, Any]:
        logits = hidden @ head
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        losses = jnp.where(here, log_z - picked, 0), jnp.where(here, log_z**2, 0)
        return 0.7 * 0.3 * jnp.sum(losses[0] + z_loss * losses[1]), (*losses, targets == jnp.argmax(logits, -1))

    def ours(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, Any]:
        total, losses = training_loss(hidden, head, targets, 0.3, z_loss=z_loss, chunk_tokens=chunk_tokens)
        return 0.7 * total, (losses.cross_entropy, losses.log_z_squared, losses.correct)

    expected, found = (jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head) for f in (plain, ours))
    not_differentiated = ours(hidden, head)
    for a, b in zip(jax.tree.leaves((found, not_differentiated)), jax.tree.leaves((expected, expected[0])), strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b.astype(jnp.float32)))
        record("chunked against plain: relative loss and gradients", error)
        assert error <= tolerances.SAME_LOSS


@pytest.mark.parametrize("argnums, products", [((0, 1), 3), (0, 2), (None, 1)], ids=["trained", "frozen head", "evaluation"])
def test_no_product_with_the_head_is_made_twice(argnums: Any, products: int) -> None:
    hidden, head, targets = hidden_head_targets()

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return training_loss(hidden, head, targets, chunk_tokens=10)[0]

    program = jax.make_jaxpr(loss if argnums is None else jax.grad(loss, argnums))(hidden, head)
    assert str(program).count("dot_general[") == products


@pytest.mark.parametrize("chunk_tokens", [10, 1024], ids=["several chunks", "tokens of one chunk"])
def test_no_product_with_the_head_has_its_left_side_turned(chunk_tokens: int) -> None:
    """XLA:CPU has no fast path for those."""
    hidden, head, targets = hidden_head_targets()
    loss = jax.grad(lambda hidden, head: training_loss(hidden, head, targets, chunk_tokens=chunk_tokens)[0], (0, 1))
    program = jax.jit(loss).lower(hidden, head).compile().as_text() or ""
    assert program.count("lhs_contracting_dims={1}") == 3
    assert program.count("lhs_contracting_dims={0}") == 0


def test_targets_stay_inside_documents() -> None:
    labels = jnp.array([[5, 6, 7, 8, 9, 1, -100, -100]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    assert next_tokens(labels, segments).tolist() == [[6, 7, -100, 9, 1, -100, -100, -100]]


def buffers(compiled_text: str) -> list[tuple[int, str]]:
    """`(elements, shape)` of every array named in an HLO module, largest first."""
    shapes = set(re.findall(r"\b(?:f|bf|s|u|pred)\d*\[[\d,]*\]", compiled_text))
    sized = [(math.prod(int(n) for n in re.findall(r"\d+", shape.partition("[")[2])), shape) for shape in shapes]
    return sorted(sized, reverse=True)


def wide_vocabulary(chunk_tokens: int) -> tuple[list[tuple[int, str]], int]:
    """The buffers of a compiled step, and the elements of its full logits, which are by far the largest thing it could hold."""
    config = tiny.variant(SMALL, text_config={"vocab_size": 8009, "num_hidden_layers": 1}, vision_config={"depth": 4})
    model = ours.build_model(config, random_hf_tensors(config))
    rows = [[Text(200), Image(2, 2), Text(11)], [Text(230)]]
    batch = training.stacked([training.labelled(config, cases.build(config, rows), text_length=256)])
    step: Any = make_step(model, loss=LossConfig(chunk_tokens=chunk_tokens))
    return buffers(step.lower(fresh(model), batch).compile().as_text()), 2 * 256 * 8009


def test_full_logits_never_exist(capsys: pytest.CaptureFixture[str]) -> None:
    found, logits = wide_vocabulary(chunk_tokens=64)
    with capsys.disabled():
        print(f"\nlargest buffer of the compiled step: {found[0][1]} ({found[0][0] / logits:.2f} of the full logits' elements)")
    assert found[0][0] < logits / 3


@pytest.mark.slow
def test_the_search_for_full_logits_finds_them() -> None:
    found, logits = wide_vocabulary(chunk_tokens=10**9)
    assert found[0][0] >= logits / 2  # tokens are cut in two at least


def test_fifty_mixed_batches_compile_once(model: Any) -> None:
    step = make_step(model, loss=LossConfig(aux_loss=1e-3, z_loss=1e-4))
    state = fresh(model)
    losses = []
    for batch in training.mixed_batches(SMALL, 50):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    assert compilations(step) == 1
    assert np.all(np.isfinite(jax.device_get(losses)))
    assert int(state.step) == 50


def test_a_bad_step_changes_nothing_and_is_counted(model: Any, plain_step: Step) -> None:
    good = training.mixed_batches(SMALL, 2)[1]
    pixels = np.where(good.patch_segment_ids[..., None] > 0, np.nan, good.pixel_values).astype(np.float32)
    bad = dataclasses.replace(good, pixel_values=pixels)
    state = fresh(model)

    def values(state: TrainState) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves((all_params(state), state.opt_state))]

    before = values(state)
    for number in (1, 2):
        state, metrics = plain_step(state, bad)
        assert not math.isfinite(float(metrics["loss"]))
        assert all(np.array_equal(a, b) for a, b in zip(before, values(state), strict=True))
        assert (int(state.step), int(state.bad_steps), int(state.bad_in_a_row)) == (number, number, number)
    state, metrics = plain_step(state, good)
    assert math.isfinite(float(metrics["loss"]))
    assert (int(state.step), int(state.bad_steps), int(state.bad_in_a_row)) == (3, 2, 0)
    assert not all(np.array_equal(a, b) for a, b in zip(before, values(state), strict=True))


def sizes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("freeze", [["vision"], ["text", "merger"], ["experts", "router", r".*norm/weight"]])
def test_frozen_parts_cost_no_optimizer_memory(model: Any, freeze: Sequence[str]) -> None:
    state = fresh(model, freeze=tuple(freeze), compute_dtype=jnp.bfloat16)
    everything = fresh(model)
    assert sizes(state.opt_state) - 4 == 2 * sizes(state.params) < 2 * sizes(everything.params)
    assert flatten(all_params(state)).keys() == flatten(everything.params).keys()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.frozen))


def test_frozen_parts_do_not_move(model: Any) -> None:
    state = fresh(model, freeze=("vision",))
    frozen, trained = (jax.tree.map(np.asarray, tree) for tree in (state.frozen, state.params))
    assert all("visual" in path and "merger" not in path for path in flatten(frozen))
    state, _ = make_step(model)(state, training.mixed_batches(SMALL, 2)[1])
    for path, before in flatten(frozen).items():
        assert np.array_equal(flatten(state.frozen)[path], before), path
    for path, before in flatten(trained).items():
        assert not np.array_equal(flatten(state.params)[path], before), path


def test_z_loss_and_aux_loss_are_added_and_reported_apart(model: Any, plain_step: Step) -> None:
    batch = training.mixed_batches(SMALL, 2)[1]
    _, plain = plain_step(fresh(model), batch)
    _, more = make_step(model, loss=LossConfig(z_loss=0.5, aux_loss=0.5))(fresh(model), batch)
    assert float(more["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6)
    assert float(more["aux_loss"]) == pytest.approx(float(plain["aux_loss"]), rel=1e-6)
    assert plain["z_loss"] is None and float(more["z_loss"]) > 0
    assert relative(more["grad_norm"], plain["grad_norm"]) > NO_LOSS_CHANGE
    output = jax.jit(lambda m, b: m(b, output_router_logits=True))(model, jax.tree.map(lambda a: a[0], batch))
    assert float(plain["aux_loss"]) == pytest.approx(float(output.aux_loss), abs=tolerances.AUX_LOSS)
    targets = next_tokens(jnp.asarray(batch.labels[0]), jnp.asarray(batch.segment_ids[0]))
    log_z = np.asarray(jax.nn.logsumexp(output.logits, axis=-1))[np.asarray(targets) >= 0]
    assert float(more["z_loss"]) == pytest.approx(float(np.mean(log_z**2)), rel=1e-5)


def test_bf16_compute_keeps_float32_masters(model: Any, plain_step: Step) -> None:
    batch = training.mixed_batches(SMALL, 2)[1]
    _, exact = plain_step(fresh(model), batch)
    state, rounded = make_step(model, compute_dtype=jnp.bfloat16)(fresh(model), batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.opt_state[0].mu)))
    assert 0 < relative(rounded["loss"], exact["loss"]) < 0.02  # bf16 keeps 8 bits


@pytest.mark.slow
def test_a_mesh_gives_the_same_step(model: Any, plain_step: Step) -> None:
    """Eight devices: the loss, the gradient norm and the moments' placement."""
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    four = training.mixed_batches(SMALL, 1, accumulation=4)[0]
    batch = training.stacked([jax.tree.map(lambda a: a[0], joined(four))] * 2)  # A 2, B 8, G 4
    _, one = plain_step(fresh(model), batch)
    with jax.set_mesh(mesh):
        state = fresh(model, mesh=mesh)
        step = make_step(model, state=state, mesh=mesh)
        for _ in range(2):
            state, metrics = step(state, shard_batch(batch, mesh))
            if int(state.step) == 1:
                for key in ("loss", "grad_norm"):
                    assert relative(metrics[key], one[key]) <= tolerances.CURVE
        assert compilations(step) == 1
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        for path, leaf in flatten(tree).items():
            wanted = partition_spec(path, leaf.shape, mesh)
            assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, wanted), leaf.ndim), path


def test_the_head_is_the_embedding_when_tied() -> None:
    config = tiny.variant(SMALL, tie_word_embeddings=True)
    model = ours.build_model(config, random_hf_tensors(config))
    assert np.array_equal(head_weight(model), model.get_input_embeddings().weight[...].T)
