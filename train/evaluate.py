"""Held-out figures: loss, token accuracy, and the exact match of whole answers.

An answer is right when greedy decoding would write exactly it. That needs no decoding: given the prompt, greedy decoding writes
the reference answer if and only if the likeliest next token is the reference's at each of its positions (by induction), so one
forward pass over prompt and answer decides it. `tests/test_evaluate.py` compares with real generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from train.errors import TrainingError
from train.optim import join
from train.state import TrainState
from train.step import forward_losses

Evaluate = Callable[[Any, Any, Any, Batch], dict[str, jax.Array]]


def answers(targets_BT: jax.Array, correct_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many answers there are and how many are right throughout. An answer is an unbroken run of target columns.

    Documents never share a run: a document's last column has no target.
    """
    T = targets_BT.shape[1]
    valid = targets_BT >= 0
    starts = valid & ~jnp.pad(valid, ((0, 0), (1, 0)))[:, :T]
    run = jnp.cumsum(starts, axis=1) - 1

    def wrong_per_run(run: jax.Array, wrong: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(wrong, run, num_segments=T)

    wrong = jax.vmap(wrong_per_run)(jnp.maximum(run, 0), (valid & (correct_BT < 0.5)).astype(jnp.int32))
    count = jnp.sum(starts, axis=1)
    right = jnp.sum((wrong == 0) & (jnp.arange(T) < count[:, None]))
    return jnp.sum(count).astype(jnp.float32), right.astype(jnp.float32)


def make_evaluate(
    model: Qwen3VLMoeForConditionalGeneration, *, chunk_tokens: int, compute_dtype: Any, mesh: Mesh | None = None
) -> Evaluate:
    """`(params, frozen, router_bias, batch [A,...]) -> sums`, one program.

    The sums: `cross_entropy`, `tokens`, `correct`, `answers`, `right`.
    """

    def evaluate(params: Any, frozen: Any, router_bias: jax.Array | None, batch: Batch) -> dict[str, jax.Array]:
        params = jax.tree.map(lambda p: p.astype(compute_dtype), params)
        ready = model.with_params(join(params, frozen))

        def micro(microbatch: Batch) -> dict[str, jax.Array]:
            _, losses, targets, _ = forward_losses(ready, microbatch, chunk_tokens=chunk_tokens, router_bias=router_bias)
            count, right = answers(targets, losses.correct)
            return {
                "cross_entropy": jnp.sum(losses.cross_entropy),
                "tokens": jnp.sum(targets >= 0, dtype=jnp.float32),
                "correct": jnp.sum(losses.correct),
                "answers": count,
                "right": right,
            }

        return jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.lax.map(micro, batch))

    # The sums whole on every device, so that every process can read them.
    return jax.jit(evaluate, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def validate(evaluate: Evaluate, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    """`validation_loss` (nats per target token), `token_accuracy`, `exact_match` (fraction of answers), over all batches.

    Raises:
      TrainingError: no batch holds a target token.
    """
    total: dict[str, Any] | None = None
    for batch in batches:
        jax.block_until_ready(total)  # else batches pile up on the device, as fast as the host can make them
        sums = evaluate(state.params, state.frozen, state.router_bias, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    sums = {} if total is None else {key: float(value) for key, value in jax.device_get(total).items()}
    if not sums.get("tokens"):
        raise TrainingError("the validation data hold no target token, expected records with an assistant turn")
    return {
        "validation_loss": sums["cross_entropy"] / sums["tokens"],
        "token_accuracy": sums["correct"] / sums["tokens"],
        "exact_match": sums["right"] / sums["answers"],
        "answers": sums["answers"],
    }
