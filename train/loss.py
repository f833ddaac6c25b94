"""Next-token cross entropy in chunks of columns, so that the logits of a whole batch never exist.

B rows, T columns, D hidden, V vocabulary, X context shards, N chunks, C columns per chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.batch import IGNORED_LABEL
from qvlmoe_jax.sharding import BATCH, active_mesh, constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLosses:
    """Per column `[B,T]`, float32, zero where there is no target.

    Attributes:
      cross_entropy: in nats. log_z_squared: of logsumexp, for the z-loss. correct: 1 where the target is the likeliest token.
    """

    cross_entropy: jax.Array
    log_z_squared: jax.Array
    correct: jax.Array


def next_tokens(labels: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The target of each column, `[...,T]`: the next column's label, or -100 where that is ignored or another document's."""
    after = jnp.concatenate([labels[..., 1:], jnp.full_like(labels[..., :1], IGNORED_LABEL)], axis=-1)
    same = jnp.concatenate([segment_ids[..., 1:] == segment_ids[..., :-1], jnp.zeros_like(labels[..., :1], bool)], axis=-1)
    return jnp.where(same & (segment_ids > 0), after, IGNORED_LABEL)


def count_targets(batch: Batch) -> jax.Array:
    """How many target tokens a Batch (with or without leading accumulation axis) has, float32."""
    return jnp.sum(next_tokens(jnp.asarray(batch.labels), jnp.asarray(batch.segment_ids)) >= 0, dtype=jnp.float32)


def head_weight(model: Qwen3VLMoeForConditionalGeneration) -> jax.Array:
    """The head as `[D,V]`, transposed from the embedding when tied."""
    if model.lm_head is None:
        return model.model.language_model.embed_tokens.weight[...].T
    return model.lm_head.weight[...]


def token_logits(hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits of `hidden [...,D]`; products in the model's dtype, float32 ones exact."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    return jnp.einsum("...D,DV->...V", hidden, head_DV, preferred_element_type=jnp.float32, precision=precision)


def _losses(hidden: jax.Array, head_DV: jax.Array, targets: jax.Array) -> TokenLosses:
    logits = token_logits(hidden, head_DV)
    logits = constrain(logits, BATCH, *([None] * (logits.ndim - 2)), "tensor")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    likeliest = jax.lax.stop_gradient(picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    values = TokenLosses(log_z - picked, jnp.square(log_z), likeliest)
    return jax.tree.map(lambda v: jnp.where(targets >= 0, v, 0), values)


def token_losses(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int) -> TokenLosses:
    """Losses of every column; the backward pass recomputes a chunk's logits instead of keeping them.

    Columns are cut, not rows, and inside each context shard, so a chunk is spread over the mesh as the batch is.

    Args:
      targets_BT: from `next_tokens`.
      chunk_tokens: tokens per batch shard and chunk, rounded to whole columns (at least one).
    """
    B, T, _ = hidden_BTD.shape
    mesh = active_mesh()
    sizes = {} if mesh is None else dict(mesh.shape)
    X = sizes.get("context", 1) if T % sizes.get("context", 1) == 0 else 1
    shards = math.prod(sizes.get(axis, 1) for axis in BATCH)
    columns = max(1, chunk_tokens // max(1, B // shards))
    N = -(-(T // X) // columns)
    if N == 1:
        return _losses(hidden_BTD, head_DV, targets_BT)
    C = -(-(T // X) // N)
    pad = N * C - T // X

    def cut(array: jax.Array, fill: int) -> jax.Array:
        array = array.reshape(B, X, T // X, *array.shape[2:])
        array = jnp.pad(array, ((0, 0), (0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 3), constant_values=fill)
        return jnp.moveaxis(array.reshape(B, X, N, C, *array.shape[3:]), 2, 0)

    def joined(array_NBXC: jax.Array) -> jax.Array:
        return jnp.moveaxis(array_NBXC, 0, 2).reshape(B, X, N * C)[:, :, : T // X].reshape(B, T)

    @jax.checkpoint
    def chunk(inputs: tuple[jax.Array, jax.Array]) -> TokenLosses:
        return _losses(inputs[0], head_DV, inputs[1])

    return jax.tree.map(joined, jax.lax.map(chunk, (cut(hidden_BTD, 0), cut(targets_BT, IGNORED_LABEL))))
