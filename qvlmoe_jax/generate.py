"""`generate`: a prompt in, an answer out. The host lays out static shapes and dispatches; it never waits for a token.

B rows, T prompt columns, S cache columns, N new tokens, V vocab, D hidden. Three compiled programs serve every prompt of a
bucket: the vision tower, a run of prompt columns, and the decoding loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvlmoe_jax.arguments import is_number
from qvlmoe_jax.batch import Batch
from qvlmoe_jax.cache import KVCache, cache_bytes, init_cache
from qvlmoe_jax.errors import GenerationError
from qvlmoe_jax.frames import bucket
from qvlmoe_jax.generation_config import MAX_ID
from qvlmoe_jax.incremental import decode_step, head, prefill, read, text_columns
from qvlmoe_jax.model import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.sampling import Sampling, choose, mark, penalise
from qvlmoe_jax.sharding import BATCH, constrain

__all__ = ["KVCache", "cache_bytes", "decode_step", "generate", "init_cache", "prefill"]


def generate(
    model: Qwen3VLMoeForConditionalGeneration,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    prefill_chunk: int | None = None,
    cache: KVCache | None = None,
    on_token: Callable[[np.ndarray], Any] | None = None,
) -> np.ndarray:
    """Continues each row of the batch, greedily at temperature 0.

    Args:
      batch: prompts padded on either side, one document per row. With a cache that holds a conversation, the next turn only.
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty: see `Sampling`.
      seed: row r draws its token number s with the key fold_in(fold_in(seed, r), s), whatever the other rows are.
      eos_token_id: what ends a row; None = the checkpoint's own, `()` = nothing does.
      pad_token_id: what a row holds after its end; None = the checkpoint's own, else the first eos_token_id, else 0.
      prefill_chunk: columns read at a time: bounds the memory of a long prompt; None = all at once.
      cache: from `init_cache`; afterwards it holds the prompt and the whole answer, ready for the next turn. None makes one
        that fits, for this call.
      on_token: is called with each step's tokens `[B]` (pad in rows that have ended) while the next step is being computed.
    Returns:
      int32 `[B, max_new_tokens]`, each row filled with pad after its end.
    Raises:
      GenerationError: sampling values out of range, ids that are none, a batch with packed or empty rows, a cache too small (says
        what would fit) or of another model.
    """
    sampling = Sampling.of(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
    )
    max_new_tokens = _count("max_new_tokens", max_new_tokens)
    prefill_chunk = None if prefill_chunk is None else _count("prefill_chunk", prefill_chunk)
    try:
        key = np.uint32(operator.index(seed) % 2**32)
    except TypeError:
        raise GenerationError(f"seed = {seed!r}, expected an integer") from None
    stop, pad = _stop_and_pad(model, eos_token_id, pad_token_id)
    if cache is not None:
        cache.check(model.config, len(batch.segment_ids))
    layout = _Layout.of(batch, max_new_tokens, prefill_chunk, cache)
    rules = _Rules(sampling, key, stop, pad)

    dtype = model.model.language_model.embed_tokens.weight.dtype
    state = cache or init_cache(model.config, layout.batch_size, layout.capacity, dtype=dtype)
    try:
        hidden, state = _read_prompt(model, batch, layout, state)
        progress = _first_token(model, hidden, state.tokens, rules, bucket(max_new_tokens))
        if on_token is None:
            state, progress = _advance(model, state, progress, rules, max_new_tokens)
        else:
            for step in range(1, max_new_tokens):
                state, ahead = _advance(model, state, progress, rules, step + 1)
                on_token(np.asarray(progress.tokens))  # waits for this step while the next one runs
                if np.asarray(progress.done).all():
                    break
                progress = ahead
            else:
                on_token(np.asarray(progress.tokens))
        if cache is not None:
            state = _feed(model, progress.tokens, state, progress.real)
    finally:
        if cache is not None:
            cache.refill(state)  # the arrays it came with were given away
    return np.asarray(progress.answer)[:, :max_new_tokens]


def columns_of(num_tokens: int, prefill_chunk: int | None) -> int:
    """How many cache columns reading a prompt takes, the padding of its last chunk included (written over later)."""
    chunk = min(prefill_chunk or bucket(num_tokens), bucket(num_tokens))
    return -(-num_tokens // chunk) * chunk


def _count(name: str, value: Any) -> int:
    """A Python integer, from numpy's too: its bits are counted."""
    if not is_number(value) or int(value) != value or value < 1:
        raise GenerationError(f"{name} = {value!r}, expected a positive number of tokens")
    return int(value)


def _stop_and_pad(model: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> tuple[np.ndarray, np.int32]:
    known = model.generation_config
    stop = _ids("eos_token_id", known.eos_token_id if eos_token_id is None else eos_token_id)
    candidates = (pad_token_id, known.pad_token_id, *stop.tolist(), 0)
    pad = _ids("pad_token_id", next(pad for pad in candidates if pad is not None))
    if pad.size != 1:
        raise GenerationError(f"pad_token_id = {pad_token_id!r}, expected one token id")
    return stop, pad[0]


def _ids(name: str, value: Any) -> np.ndarray:
    """Token ids `[n]` int32 from one or a sequence of them; a negative one is of no token, and stands for none."""
    ids = np.atleast_1d(np.asarray(value))
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.max() > MAX_ID or ids.min() < -MAX_ID)):
        raise GenerationError(f"{name} = {value!r}, expected one token id or a sequence of them, none above {MAX_ID}")
    return ids.astype(np.int32)


@dataclass(frozen=True)
class _Layout:
    """The static shapes of one call, from what the host knows.

    Attributes:
      chunk: columns read at a time; columns: a multiple of it that holds the whole prompt; capacity: S.
    """

    batch_size: int
    chunk: int
    columns: int
    capacity: int

    @classmethod
    def of(cls, batch: Batch, max_new_tokens: int, prefill_chunk: int | None, cache: KVCache | None) -> _Layout:
        segment_ids = np.asarray(batch.segment_ids)
        if segment_ids.size == 0 or not (filled := segment_ids > 0).any(axis=1).all():
            raise GenerationError("a row of the batch holds no token, expected a prompt in every row; leave empty rows out")
        if segment_ids.max() > 1:
            raise GenerationError("a row of the batch holds several packed documents, expected one; give each a row of its own")
        B, end = len(segment_ids), int(np.flatnonzero(filled.any(axis=0))[-1]) + 1
        start, capacity = (0, None) if cache is None else (int(cache.length), cache.capacity)
        chunk = min(prefill_chunk or bucket(end), bucket(end))
        columns = columns_of(end, prefill_chunk)
        if capacity is None:
            capacity = max(columns, bucket(end)) + bucket(max_new_tokens)
        elif chunk == columns:
            chunk = columns = min(columns, max(capacity - start, end))
        needed = start + max(columns, end + max_new_tokens)
        if needed > capacity:
            raise GenerationError(
                f"the cache has {capacity} columns, {start} of them used; {end} of prompt and {max_new_tokens} new tokens need "
                f"{needed}; make one with init_cache(config, {B}, {bucket(needed)})"
            )
        return cls(B, chunk, columns, capacity)

    def fit(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch's text columns, cut or padded on the right to `columns`."""
        fill = {"visual_index": -1}
        out = {}
        for name, value in text_columns(batch, batch.position_ids).items():
            value = np.asarray(value)[..., : self.columns]
            pad = [(0, 0)] * (value.ndim - 1) + [(0, self.columns - value.shape[-1])]
            out[name] = np.pad(value, pad, constant_values=fill.get(name, 0))
        return out


def _read_prompt(model: Any, batch: Batch, layout: _Layout, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Hidden states `[B,D]` after each row's last token, and the cache: pictures once, then the text chunk by chunk."""
    dtype = model.get_input_embeddings().weight.dtype  # of the cache it may differ
    visual = _look(model, batch) if batch.patch_segment_ids.size else None
    columns = layout.fit(batch)
    columns["position_ids"] = columns["position_ids"] + np.asarray(cache.next_position)[:, None]
    hidden: Any = np.zeros((layout.batch_size, model.config.text_config.hidden_size), dtype)
    for first in range(0, layout.columns, layout.chunk):
        part = {name: value[..., first : first + layout.chunk] for name, value in columns.items()}
        hidden, cache = _read(model, part, visual, hidden, cache)
    return hidden, cache


@jax.jit
def _look(model: Any, batch: Batch) -> Any:
    return model.model.visual_features(batch)


_read = jax.jit(read, donate_argnames="cache")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rules:
    """How tokens are chosen and when rows end: sampling, seed, stop ids `[n]`, pad id."""

    sampling: Sampling
    seed: Any
    stop: Any
    pad: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Progress:
    """The answer so far.

    Attributes:
      answer: `[B,N]`, pad where nothing was chosen yet; step: how many columns of it are.
      tokens: `[B]`, the last chosen, not yet in the cache; real: `[B]`, which of them are not just pad.
      done: `[B]`, rows that have ended.
      seen, generated: `[B,V]` bool, tokens of prompt and answer, of the answer alone; None where no penalty needs them.
    """

    answer: jax.Array
    step: jax.Array
    tokens: jax.Array
    real: jax.Array
    done: jax.Array
    seen: jax.Array | None
    generated: jax.Array | None

    def pinned(self) -> _Progress:
        """With its layout over the active mesh stated, as `KVCache.pinned`."""
        return jax.tree.map(lambda a: constrain(a, *(BATCH, None)[: a.ndim]), self)


@partial(jax.jit, static_argnames="length")
def _first_token(model: Any, hidden: jax.Array, history: jax.Array, rules: _Rules, length: int) -> _Progress:
    """Chooses from the prompt's last hidden states. `history`: the cache's `tokens`."""
    logits = head(model, hidden)
    B, V = logits.shape
    nothing = jnp.zeros((B, V), bool)
    false = jnp.zeros(B, bool)
    start = _Progress(
        answer=jnp.full((B, length), rules.pad, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros(B, jnp.int32),
        real=false,
        done=false,
        seen=None if rules.sampling.repetition_penalty is None else mark(nothing, history, history >= 0),
        generated=None if rules.sampling.presence_penalty is None else nothing,
    )
    return _next_token(logits, start, rules)


def _next_token(logits: jax.Array, progress: _Progress, rules: _Rules) -> _Progress:
    real = ~progress.done
    logits = penalise(logits, rules.sampling, progress.seen, progress.generated)
    tokens = jnp.where(real, choose(logits, rules.sampling, rules.seed, progress.step), rules.pad)
    ended = jnp.any(tokens[:, None] == rules.stop, axis=1)

    def marked(seen: jax.Array | None) -> jax.Array | None:
        return None if seen is None else mark(seen, tokens[:, None], real[:, None])

    return _Progress(
        answer=jax.lax.dynamic_update_slice(progress.answer, tokens[:, None], (0, progress.step)),
        step=progress.step + 1,
        tokens=tokens,
        real=real,
        done=progress.done | ended,
        seen=marked(progress.seen),
        generated=marked(progress.generated),
    ).pinned()


@partial(jax.jit, donate_argnames="cache")
def _advance(model: Any, cache: KVCache, progress: _Progress, rules: _Rules, until: Any) -> tuple[KVCache, _Progress]:
    """Tokens up to number `until`, or until every row has ended: a loop on the device."""

    def unfinished(state: tuple[KVCache, _Progress]) -> jax.Array:
        return (state[1].step < until) & ~jnp.all(state[1].done)

    def one(state: tuple[KVCache, _Progress]) -> tuple[KVCache, _Progress]:
        cache, progress = state
        logits, cache = decode_step(model, progress.tokens, cache, progress.real)
        return cache, _next_token(logits, progress, rules)

    cache, progress = jax.lax.while_loop(unfinished, one, (cache, progress))
    return cache.pinned(), progress.pinned()  # the loop may lay out its state in its own way


@partial(jax.jit, donate_argnames="cache")
def _feed(model: Any, tokens: jax.Array, cache: KVCache, valid: jax.Array) -> KVCache:
    """The cache with one more token per row."""
    return decode_step(model, tokens, cache, valid)[1]
