"""Next-token cross entropy in chunks of columns, so that the logits of a whole batch never exist.

B rows, T columns, D hidden, V vocabulary, N chunks, C tokens per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.batch import IGNORED_LABEL
from qvlmoe_jax.collectives import axes_of, gather
from qvlmoe_jax.sharding import HIDDEN, VOCAB, active_mesh, fit
from qvlmoe_jax.turns import in_turn


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


def _losses(hidden: jax.Array, head_DV: jax.Array, targets: jax.Array, vocab_axis: str | None) -> TokenLosses:
    """Losses of one chunk. With `vocab_axis`, this device holds one part of the vocabulary and the parts are combined."""
    logits = token_logits(hidden, head_DV)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    own = jnp.maximum(targets, 0)
    if vocab_axis is None:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0]
    else:
        top = jax.lax.pmax(top, vocab_axis)
        log_z = top + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), vocab_axis))
        own = own - jax.lax.axis_index(vocab_axis) * logits.shape[-1]
        here = (own >= 0) & (own < logits.shape[-1])
        picked = jnp.take_along_axis(logits, jnp.where(here, own, 0)[..., None], axis=-1)[..., 0]
        picked = jax.lax.psum(jnp.where(here, picked, 0), vocab_axis)
    likeliest = jax.lax.stop_gradient(picked >= top).astype(jnp.float32)
    values = TokenLosses(log_z - picked, jnp.square(log_z), likeliest)
    return jax.tree.map(lambda v: jnp.where(targets >= 0, v, 0), values)


def _chunked(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk_tokens: int, vocab_axis: str | None
) -> TokenLosses:
    """Losses of one device's tokens, `chunk_tokens` at a time; the backward pass recomputes a chunk's logits."""
    B, T, D = hidden_BTD.shape
    hidden, targets = hidden_BTD.reshape(B * T, D), targets_BT.reshape(B * T)
    N = -(-B * T // chunk_tokens)
    if N == 1:
        losses = _losses(hidden, head_DV, targets, vocab_axis)
        return jax.tree.map(lambda v: v.reshape(B, T), losses)
    C = -(-B * T // N)
    pad = N * C - B * T
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(N, C, D)
    targets = jnp.pad(targets, (0, pad), constant_values=IGNORED_LABEL).reshape(N, C)

    @jax.checkpoint
    def chunk(inputs: tuple[jax.Array, jax.Array]) -> TokenLosses:
        return _losses(inputs[0], head_DV, inputs[1], vocab_axis)

    return jax.tree.map(lambda v: v.reshape(N * C)[: B * T].reshape(B, T), jax.lax.map(chunk, (hidden, targets)))


def token_losses(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int) -> TokenLosses:
    """Losses of every column; the logits of at most about `chunk_tokens` tokens per device exist at a time.

    On a mesh the head is gathered once for all chunks and its gradient reduce-scattered once; over `tensor` the vocabulary
    stays split.

    Args:
      targets_BT: from `next_tokens`.
    """
    mesh = active_mesh()
    if mesh is None:
        return _chunked(hidden_BTD, head_DV, targets_BT, chunk_tokens, None)
    rows = fit(HIDDEN, hidden_BTD.shape, mesh)
    head = fit((None, VOCAB), head_DV.shape, mesh)
    hidden_BTD, head_DV = in_turn(hidden_BTD, head_DV, HIDDEN, (None, VOCAB))
    vocab_axis = "tensor" if "tensor" in axes_of(head[1]) else None

    def local(hidden: jax.Array, head_DV: jax.Array, targets: jax.Array) -> TokenLosses:
        return _chunked(hidden, gather(head_DV, head), targets, chunk_tokens, vocab_axis)

    columns = P(*rows[:2])
    return jax.shard_map(local, in_specs=(rows, head, columns), out_specs=columns, check_vma=False)(
        hidden_BTD, head_DV, targets_BT
    )
