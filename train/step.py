"""The one jitted function: `train_step(state, batch) -> (state, metrics)`. Nothing in it waits for the host.

A accumulated microbatches; everything else as in `qvlmoe_jax`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.moe import RouterStats
from qvlmoe_jax.sharding import HIDDEN
from qvlmoe_jax.turns import after, batch_after
from train.accumulate import accumulate
from train.config import LossConfig, OptimizerConfig, RouterConfig
from train.keeping import keeping, kept
from train.loss import TokenLosses, count_targets, head_weight, next_tokens, training_loss
from train.optim import join
from train.router import moved_bias, router_losses
from train.state import TrainState, state_shardings

Metrics = dict[str, Any]
Step = jax.stages.Wrapped
"""`(state, batch) -> (state, metrics)`, jitted."""


class ForwardLosses(NamedTuple):
    """Of one microbatch. Only `total` has a gradient (`train.loss.training_loss`)."""

    total: jax.Array
    losses: TokenLosses
    targets_BT: jax.Array
    router_stats: RouterStats | None


def forward_losses(
    model: Qwen3VLMoeForConditionalGeneration,
    batch: Batch,
    *,
    chunk_tokens: int,
    scale: jax.Array | float = 1.0,
    z_loss: float = 0.0,
    router_bias: jax.Array | None = None,
) -> ForwardLosses:
    """Forward pass of one microbatch (no leading A)."""
    out = model.model(batch, router_bias=router_bias)
    with jax.named_scope("loss"):
        labels, segments = (after(a, out.last_hidden_state, HIDDEN[:2], HIDDEN) for a in (batch.labels, batch.segment_ids))
        targets = next_tokens(labels, segments)
        total, losses = training_loss(
            out.last_hidden_state, head_weight(model), targets, scale, z_loss=z_loss, chunk_tokens=chunk_tokens
        )
    return ForwardLosses(total, losses, targets, out.router_stats)


def make_train_step(
    model: Qwen3VLMoeForConditionalGeneration,
    tx: optax.GradientTransformation,
    rate: Callable[[jax.Array], jax.Array],
    *,
    loss: LossConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    router: RouterConfig | None = None,
    compute_dtype: Any = jnp.float32,
    state: TrainState | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """Compiles to one program per batch shape; the state is donated.

    Args:
      model: gives the structure and kernels; its parameters are not used (abstract ones do).
      rate: step number -> learning rate.
      state: with a mesh, the state whose layout the results are pinned to.
    Returns:
      `train_step`. Metrics are device arrays: `loss` (mean cross entropy over all target tokens of the batch), `aux_loss` and
      `router_z_loss` (None without experts), `z_loss` (None when off; all three unweighted), `accuracy`, `grad_norm` (before
      clipping), `learning_rate`, `tokens`, `bad_steps`, `bad_in_a_row`, `router` (RouterStats summed over A, or None),
      `router_bias` (after the step, or None).
    """
    loss, optimizer, router = loss or LossConfig(), optimizer or OptimizerConfig(), router or RouterConfig()

    def objective(trained: Any, given: dict[str, Any], batch: Batch) -> tuple[jax.Array, Any]:
        """One microbatch's part of the total. CE is divided by the tokens of ALL microbatches; aux is a mean over them."""
        ready = model.with_params(join(trained, given["frozen"]))
        total, losses, _, stats = forward_losses(
            ready,
            batch,
            chunk_tokens=loss.chunk_tokens,
            scale=1 / given["tokens"],
            z_loss=loss.z_loss,
            router_bias=given["router_bias"],
        )
        sums = jax.tree.map(jnp.sum, losses)
        routing = router_losses(stats, given["valid"])
        aux = routing.aux * given["share"]
        if loss.aux_loss:
            total += loss.aux_loss * aux
        if loss.router_z_loss:
            total += loss.router_z_loss * routing.z
        return total, (sums, stats, aux, routing.z)

    def micro(given: dict[str, Any], batch: Batch) -> tuple[Any, Any]:
        (total, extras), grads = jax.value_and_grad(objective, has_aux=True)(given["trained"], given, batch)
        return grads, (total, *extras)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(jnp.asarray, batch)
        targets, valid = count_targets(batch), jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
        batch, tokens = batch_after(batch, [targets, valid]), jnp.maximum(targets, 1)
        with jax.named_scope("cast"):
            compute = jax.tree.map(lambda p: p.astype(compute_dtype), state.params)
        given = {
            "trained": compute,
            "frozen": state.frozen,
            "router_bias": state.router_bias,
            "tokens": tokens,
            "valid": valid,
            "share": jnp.float32(1 / batch.input_ids.shape[0]),
        }
        grads, (total, token_sums, stats, aux, router_z) = accumulate(micro, given, batch)

        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            good = jnp.isfinite(total) & jnp.isfinite(norm)
            if optimizer.clip_norm is not None:
                scale = jnp.minimum(1.0, optimizer.clip_norm / jnp.maximum(norm, 1e-12))
                grads = jax.tree.map(lambda g: g * scale, grads)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
            direction, opt_state = keeping(tx).update(grads, state.opt_state, state.params, good=good)
            lr = rate(state.step)
            params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, direction)

        router_bias = state.router_bias
        if router_bias is not None:
            assert stats is not None  # a bias has a row for each MoE layer
            moved = moved_bias(router_bias, stats.tokens_per_expert, router.bias_update_rate)
            router_bias = kept(good, moved, router_bias)
        bad = jnp.where(good, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=kept(good, params, state.params),
            frozen=state.frozen,
            opt_state=opt_state,
            router_bias=router_bias,
            rng=state.rng,
            bad_steps=state.bad_steps + bad,
            bad_in_a_row=jnp.where(good, 0, state.bad_in_a_row + 1).astype(jnp.int32),
        )
        metrics = {
            "loss": token_sums.cross_entropy / tokens,
            "aux_loss": aux if stats is not None else None,
            "router_z_loss": router_z if stats is not None else None,
            "z_loss": token_sums.log_z_squared / tokens if loss.z_loss else None,
            "accuracy": token_sums.correct / tokens,
            "grad_norm": norm,
            "learning_rate": lr,
            "tokens": targets,
            "bad_steps": new_state.bad_steps,
            "bad_in_a_row": new_state.bad_in_a_row,
            "router": stats,
            "router_bias": router_bias,
        }
        return new_state, metrics

    # The metrics whole on every device, so that every process can read them.
    shardings = None if mesh is None or state is None else (state_shardings(state, mesh), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)
