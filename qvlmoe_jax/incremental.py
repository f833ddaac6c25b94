"""The decoder over a KV cache: `prefill` reads a prompt, `decode_step` one more token per row, both by the same `extend`.

B rows, T new columns, S cache columns, D hidden, K DeepStack levels, V vocab. Every function here is pure: jit it and donate
the cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.batch import Batch
from qvlmoe_jax.blockwise import blockwise_attention
from qvlmoe_jax.cache import CACHE_SPEC, KVCache
from qvlmoe_jax.cached_attention import cached_attention
from qvlmoe_jax.layer_plan import Run, plan_layers
from qvlmoe_jax.model import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.sharding import BATCH, active_mesh, constrain
from qvlmoe_jax.text import Qwen3VLMoeTextModel

Visual = tuple[jax.Array, jax.Array] | None
"""What `Qwen3VLMoeModel.visual_features` returns."""
FEW_COLUMNS = 32
"""Fewer new columns than these are not worth laying a layer's keys and values out anew."""


def prefill(model: Qwen3VLMoeForConditionalGeneration, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Reads a prompt, or the next turn of a conversation, into the cache.

    Args:
      batch: the new columns only, with positions counted from 0 as `Batch.from_hf` makes them; every row holds a token. They
        continue where each row of the cache stands. Padding may lie on either side.
      cache: needs room for all T columns of the batch. Those past its last token are written over later.
    Returns:
      the logits `[B,V]` after each row's last token, and the cache.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    shape = (batch.input_ids.shape[0], model.config.text_config.hidden_size)
    hidden = jnp.zeros(shape, model.get_input_embeddings().weight.dtype)  # of the cache it may differ
    positions = batch.position_ids + cache.next_position[:, None]
    hidden, cache = read(model, text_columns(batch, positions), model.model.visual_features(batch), hidden, cache)
    return head(model, hidden), cache


def decode_step(
    model: Qwen3VLMoeForConditionalGeneration, tokens: jax.Array, cache: KVCache, valid: jax.Array | None = None
) -> tuple[jax.Array, KVCache]:
    """Reads one token per row: `tokens [B]` -> the logits `[B,V]` after them, and the cache.

    Args:
      valid: `[B]` bool, False for rows that take no token in this step (their logits mean nothing); None = all take one.
    """
    B = tokens.shape[0]
    segment_ids = jnp.ones((B, 1), jnp.int32) if valid is None else valid.astype(jnp.int32)[:, None]
    columns = {
        "input_ids": tokens[:, None],
        "visual_index": jnp.full((B, 1), -1, jnp.int32),
        "segment_ids": segment_ids,
        "position_ids": jnp.broadcast_to(cache.next_position[:, None], (3, B, 1)),
    }
    x, cache = extend(model, columns, None, cache)
    return head(model, x[:, 0]), dataclasses.replace(cache, length=cache.length + 1).pinned()


def text_columns(batch: Batch, position_ids: jax.Array) -> dict[str, jax.Array]:
    """The fields of `batch` that have one entry per text column, with these positions `[3,B,T]`."""
    names = ("input_ids", "visual_index", "segment_ids")
    return {name: getattr(batch, name) for name in names} | {"position_ids": position_ids}


def read(
    model: Qwen3VLMoeForConditionalGeneration, columns: dict[str, jax.Array], visual: Visual, hidden: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """A prompt's columns, all or a chunk of them.

    Args:
      columns: `input_ids, visual_index, segment_ids [B,T]`, `position_ids [3,B,T]` (absolute).
      hidden: `[B,D]`, kept for rows without a token among these columns.
    Returns:
      the normed hidden state `[B,D]` of each row's last token so far, and the cache.
    """
    x, cache = extend(model, columns, visual, cache)
    valid = columns["segment_ids"] > 0
    column = jnp.arange(valid.shape[1])
    last = jnp.max(jnp.where(valid, column, -1), axis=1)
    own = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    hidden = constrain(jnp.where((last >= 0)[:, None], own, hidden), BATCH, None)
    return hidden, dataclasses.replace(cache, length=cache.length + jnp.max(last) + 1).pinned()


def head(model: Qwen3VLMoeForConditionalGeneration, hidden: jax.Array) -> jax.Array:
    """Logits `[B,V]` of hidden states `[B,D]`."""
    with jax.named_scope("lm_head"):
        return model.logits(hidden[:, None])[:, 0]


def extend(
    model: Qwen3VLMoeForConditionalGeneration, columns: dict[str, jax.Array], visual: Visual, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs new columns through the decoder and writes them at `cache.length`, which the caller moves on.

    Returns:
      normed hidden states `[B,T,D]`, and the cache.
    """
    text = model.model.language_model
    ids, positions, segment_ids = columns["input_ids"], columns["position_ids"], columns["segment_ids"]
    x, deepstack = model.model.embed(ids, columns["visual_index"], visual)
    x = constrain(x, BATCH, None, None)
    valid = segment_ids > 0
    ahead = jnp.max(jnp.where(valid, jnp.max(positions, axis=0) + 1, 0), axis=1)
    cache = dataclasses.replace(
        cache,
        tokens=jax.lax.dynamic_update_slice(cache.tokens, jnp.where(valid, ids, -1), (0, cache.length)),
        next_position=jnp.maximum(cache.next_position, ahead),
    )
    rotary = text.rotary(positions, x.dtype)
    for run in plan_layers(text.config.layer_kinds()):
        x, cache = _scan(text, run, x, rotary, segment_ids, deepstack, cache)
    return text.norm(x), cache


def _scan(
    text: Qwen3VLMoeTextModel,
    run: Run,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array,
    deepstack: jax.Array | None,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """The run's layers in order. The cache is carried, not scanned over: a carry is updated where it lies."""
    levels = 0 if deepstack is None else deepstack.shape[0]
    held = cache.tokens >= 0

    def body(carry: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array) -> tuple[Any, None]:
        x, k, v = carry
        for slot in run.slots:
            layer, number = jax.tree.map(lambda a: a[index], text.slot_layers(slot)), slot.first + index * slot.period
            with jax.named_scope("attention"):
                q, new_k, new_v = layer.self_attn.heads(layer.input_layernorm(x), rotary)
                k, v = (_write(a, new, number, cache.length) for a, new in ((k, new_k), (v, new_v)))
                heads = _attend(q, k, v, number, held, cache.length, text.backend)
                x = x + layer.self_attn.o_proj(heads)
            x, _ = layer.feed_forward(x, segment_ids > 0, text.expert_stack(slot, index))
            if slot.first < levels:
                assert deepstack is not None
                x = x + jnp.where(number < levels, deepstack[jnp.minimum(number, levels - 1)], 0)
        return (x, k, v), None

    (x, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), jnp.arange(run.repeats))
    return x, dataclasses.replace(cache, k=k, v=v)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, held: jax.Array, first: jax.Array, backend: BackendConfig
) -> jax.Array:
    """New columns over the cache: a few where it lies, a prompt with the layer's keys and values laid out for it first.

    (On a mesh that layout would mix rows of different devices.)
    """
    if q.shape[1] < FEW_COLUMNS or active_mesh() is not None:
        block = backend.attention_block(q.shape[2])
        return cached_attention(q, k, v, layer=layer, valid_BS=held, first=first, block=block)
    segments, held = jnp.ones(q.shape[:2], jnp.int32), held.astype(jnp.int32)
    block = backend.attention_chunk
    return blockwise_attention(
        q, k[layer], v[layer], q_segments=segments, kv_segments=held, causal=True, block=block, first=first
    )


def _write(cache_LBSKH: jax.Array, new_BTKH: jax.Array, layer: jax.Array, column: jax.Array) -> jax.Array:
    new = new_BTKH[None].astype(cache_LBSKH.dtype)
    return constrain(jax.lax.dynamic_update_slice(cache_LBSKH, new, (layer, 0, column, 0, 0)), *CACHE_SPEC)
