"""The one jitted function: `train_step(state, batch) -> (state, metrics)`. Nothing in it waits for the host.

A accumulated microbatches; everything else as in `qvlmoe_jax`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.model import load_balancing_loss
from qvlmoe_jax.moe import RouterStats
from qvlmoe_jax.sharding import tree_shardings
from train.config import LossConfig, OptimizerConfig
from train.loss import TokenLosses, count_targets, head_weight, next_tokens, token_losses
from train.optim import join
from train.state import TrainState, state_shardings

Metrics = dict[str, Any]
Step = jax.stages.Wrapped
"""`(state, batch) -> (state, metrics)`, jitted."""


def forward_losses(
    model: Qwen3VLMoeForConditionalGeneration, batch: Batch, *, chunk_tokens: int
) -> tuple[TokenLosses, jax.Array, RouterStats | None]:
    """Forward pass of one microbatch (no leading A): losses `[B,T]`, their targets `[B,T]`, and the router's sums."""
    out = model.model(batch)
    with jax.named_scope("loss"):
        targets = next_tokens(batch.labels, batch.segment_ids)
        losses = token_losses(out.last_hidden_state, head_weight(model), targets, chunk_tokens=chunk_tokens)
    return losses, targets, out.router_stats


def make_train_step(
    model: Qwen3VLMoeForConditionalGeneration,
    tx: optax.GradientTransformation,
    rate: Callable[[jax.Array], jax.Array],
    *,
    loss: LossConfig | None = None,
    optimizer: OptimizerConfig | None = None,
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
      `train_step`. Metrics are device arrays: `loss` (mean cross entropy over all target tokens of the batch), `aux_loss`,
      `z_loss` (unweighted; None when off), `accuracy`, `grad_norm` (before clipping), `learning_rate`, `tokens`,
      `bad_steps`, `bad_in_a_row`, `router` (RouterStats summed over A, or None).
    """
    loss, optimizer = loss or LossConfig(), optimizer or OptimizerConfig()

    def objective(trained: Any, frozen: Any, batch: Batch, share: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """One microbatch's part of the total. CE is divided by the tokens of ALL microbatches; aux is a mean over them."""
        losses, _, router = forward_losses(model.with_params(join(trained, frozen)), batch, chunk_tokens=loss.chunk_tokens)
        sums = jax.tree.map(jnp.sum, losses)
        aux = load_balancing_loss(router) if router is not None else jnp.zeros(())
        total = sums.cross_entropy / tokens
        if loss.z_loss:
            total += loss.z_loss * sums.log_z_squared / tokens
        if loss.aux_loss and router is not None:
            total += loss.aux_loss * share * aux
        return total, (sums, router, aux * share)

    def pinned(grads: Any) -> Any:
        # Gradients out of scan and checkpoint can lose their fsdp axis; the table says where they live.
        return grads if mesh is None else jax.lax.with_sharding_constraint(grads, tree_shardings(grads, mesh))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(jnp.asarray, batch)
        A = batch.input_ids.shape[0]
        tokens = jnp.maximum(count_targets(batch), 1)
        share = jnp.float32(1 / A)
        with jax.named_scope("cast"):
            compute = jax.tree.map(lambda p: p.astype(compute_dtype), state.params)
        gradient = jax.value_and_grad(objective, has_aux=True)

        def micro(microbatch: Batch) -> tuple[Any, Any]:
            (total, extras), grads = gradient(compute, state.frozen, microbatch, share, tokens)
            return pinned(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), (total, extras)

        if A == 1:
            grads, sums = micro(jax.tree.map(lambda a: a[0], batch))
        else:

            def accumulate(carry: Any, microbatch: Batch) -> tuple[Any, None]:
                grads, sums = carry
                more, extra = micro(microbatch)
                return (pinned(jax.tree.map(jnp.add, grads, more)), jax.tree.map(jnp.add, sums, extra)), None

            zeros = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, jax.tree.map(lambda a: a[0], batch))
            )
            (grads, sums), _ = jax.lax.scan(accumulate, (pinned(zeros[0]), zeros[1]), batch)
        total, (token_sums, router, aux) = sums

        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            good = jnp.isfinite(total) & jnp.isfinite(norm)
            if optimizer.clip_norm is not None:
                scale = jnp.minimum(1.0, optimizer.clip_norm / jnp.maximum(norm, 1e-12))
                grads = jax.tree.map(lambda g: g * scale, grads)
            direction, opt_state = tx.update(
                jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params), state.opt_state, state.params
            )
            lr = rate(state.step)
            params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, direction)

        def keep_if_bad(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        bad = jnp.where(good, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=keep_if_bad(params, state.params),
            frozen=state.frozen,
            opt_state=keep_if_bad(opt_state, state.opt_state),
            rng=state.rng,
            bad_steps=state.bad_steps + bad,
            bad_in_a_row=jnp.where(good, 0, state.bad_in_a_row + 1).astype(jnp.int32),
        )
        metrics = {
            "loss": token_sums.cross_entropy / tokens,
            "aux_loss": aux if router is not None else None,
            "z_loss": token_sums.log_z_squared / tokens if loss.z_loss else None,
            "accuracy": token_sums.correct / tokens,
            "grad_norm": norm,
            "learning_rate": lr,
            "tokens": count_targets(batch),
            "bad_steps": new_state.bad_steps,
            "bad_in_a_row": new_state.bad_in_a_row,
            "router": router,
        }
        return new_state, metrics

    # The metrics whole on every device, so that every process can read them.
    shardings = None if mesh is None or state is None else (state_shardings(state, mesh), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)
