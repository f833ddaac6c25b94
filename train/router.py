"""Router health: the losses on its sums, and the bias that balances the experts without a loss.

L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.model import load_balancing_loss
from qvlmoe_jax.moe import RouterStats
from qvlmoe_jax.sharding import active_mesh
from train.config import RouterConfig


def bias_shape(config: RouterConfig, model: Qwen3VLMoeConfig) -> tuple[int, int] | None:
    """`(L, E)` of the bias a run trains; None = it trains none.

    Raises:
      ConfigError: a bias for a model without experts.
    """
    if not config.bias_update_rate:
        return None
    layers = model.text_config.layer_kinds().count("moe")
    if not layers:
        raise ConfigError(
            f"router.bias_update_rate = {config.bias_update_rate}, but the model has no layer with experts; expected 0"
        )
    return layers, model.text_config.num_experts


def moved_bias(bias_LE: jax.Array, tokens_per_expert_LE: jax.Array, rate: float) -> jax.Array:
    """The bias after a step: up by `rate` for an expert below its layer's mean load, down above (arXiv 2408.15664, algorithm 1).

    Args:
      tokens_per_expert_LE: the loads of the whole step, over all devices and microbatches.
    """
    mean = jnp.mean(tokens_per_expert_LE, axis=-1, keepdims=True)
    return bias_LE + rate * jnp.sign(mean - tokens_per_expert_LE)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterLosses:
    """Unweighted. aux: HF's load balancing, of one microbatch. z: mean of logsumexp(router logits)^2 over tokens and layers."""

    aux: jax.Array
    z: jax.Array


def router_losses(stats: RouterStats | None, valid_tokens: jax.Array) -> RouterLosses:
    """The losses of one microbatch, zero without experts; one data shard's share inside `accumulate`, and the shares add up.

    Args:
      valid_tokens: of all microbatches: z is divided by them, as cross entropy is by all target tokens.
    """
    if stats is None:
        return RouterLosses(jnp.zeros(()), jnp.zeros(()))
    mesh = active_mesh()
    manual = () if mesh is None else mesh.manual_axes
    whole = jax.lax.psum(jax.lax.stop_gradient(stats), manual) if manual else stats
    z = jnp.sum(stats.log_z_squared) / (stats.log_z_squared.shape[0] * jnp.maximum(valid_tokens, 1))
    return RouterLosses(load_balancing_loss(stats, whole), z)
