"""A conversation with a model: each turn reads only what is new, and the answer comes as text while it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qvlmoe_jax.batch import Batch
from qvlmoe_jax.cache import KVCache, grow, init_cache
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.frames import bucket
from qvlmoe_jax.generate import columns_of, generate
from qvlmoe_jax.model import Qwen3VLMoeForConditionalGeneration

if TYPE_CHECKING:
    from qvlmoe_jax.processor import Processor

MIN_COLUMNS = 1024
"""Of a conversation's cache: each growth compiles the decoding loop again, so the first turns should not need one."""


class TextStream:
    """Token ids to text, piece by piece: a piece ends where the bytes so far are whole characters."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # decoding starts here: a tokenizer may write a word differently after another one
        self._shown = 0  # the ids before this are in pieces already returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is still missing bytes."""
        self._ids.append(int(token))
        return self._piece(final=False)

    def finish(self) -> str:
        """What is left, incomplete characters included (as U+FFFD)."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


@dataclass(frozen=True)
class Answer:
    """One turn.

    Attributes:
      text: without special tokens. ids: with the stop token, if it was reached.
      prompt_tokens: of the whole conversation so far; read_tokens: those not yet in the cache, which this turn read.
      finish_reason: "stop", or "length" when max_new_tokens came first.
      first_token_seconds: reading the prompt, compilation included; decode_seconds: from the first token to the last.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    read_tokens: int
    finish_reason: str
    first_token_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """After the first token; 0 for a single one."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 else 0.0


@dataclass
class Chat:
    """A model, its processor and a conversation.

    Attributes:
      options: `generate`'s keyword arguments: max_new_tokens, sampling, seed, prefill_chunk.
      messages: HF's list, the answers included.
    """

    model: Qwen3VLMoeForConditionalGeneration
    processor: Processor
    options: Mapping[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)
    _cache: KVCache | None = None
    _prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # the last turn's prompt, answers left out
    _last: int = -1  # the last token in the cache

    def encode(self, content: list[dict[str, Any]], *, answers: bool = False) -> dict[str, np.ndarray]:
        """The processor's arrays for the conversation and one more turn of the user; with `answers` False those are left empty.

        Answers are in the cache as the tokens they were made of; their text might be cut into other tokens.
        """
        empty = [m if answers or m["role"] != "assistant" else m | {"content": ""} for m in self.messages]
        return self.processor.encode([[*empty, {"role": "user", "content": content}]])

    def ask(
        self,
        content: list[dict[str, Any]],
        on_text: Callable[[str], Any] = lambda text: None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> Answer:
        """One turn of the user, its parts in HF's form.

        Args:
          on_text: gets the answer piece by piece. arrays: `encode(content)`, if that is already there.
        """
        arrays = self.encode(content) if arrays is None else arrays
        prompt = arrays["input_ids"][0][arrays["attention_mask"][0] != 0]
        known = len(self._prompt)
        if self._cache is not None and known < len(prompt) and np.array_equal(prompt[:known], self._prompt):
            known += int(prompt[known] == self._last)  # the answer's own end token
        else:  # the first turn, or a template that writes old turns differently: read everything
            known, self._cache = 0, None
            arrays = self.encode(content, answers=True) if self.messages else arrays
        new = after(arrays, known, self.model.config)
        num_new, held = new["input_ids"].shape[1], 0 if self._cache is None else int(self._cache.length)
        batch = Batch.from_hf(self.model.config, **new)

        stream, pieces, new_ids, times = TextStream(self.processor.decode), [], [], [time.perf_counter()]
        stop = set(self.model.generation_config.eos_token_id)

        def on_token(tokens: np.ndarray) -> None:
            times.append(time.perf_counter())
            new_ids.append(int(tokens[0]))
            if piece := stream.push(new_ids[-1]):
                pieces.append(piece)
                on_text(piece)

        try:
            columns = columns_of(num_new, self.options.get("prefill_chunk"))
            self._cache = self._with_room(held + columns + self.options["max_new_tokens"])
            generate(self.model, batch, cache=self._cache, on_token=on_token, **self.options)
        except BaseException:
            self._cache = None  # half a turn is in it
            raise
        if piece := stream.finish():
            pieces.append(piece)
            on_text(piece)
        self._prompt, self._last = prompt, new_ids[-1]
        text = "".join(pieces)
        turn = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        self.messages = [*self.messages, *turn]
        return Answer(
            text=text,
            ids=new_ids,
            prompt_tokens=held + num_new,
            read_tokens=num_new,
            finish_reason="stop" if new_ids[-1] in stop else "length",
            first_token_seconds=times[1] - times[0],
            decode_seconds=times[-1] - times[1],
        )

    def _with_room(self, length: int) -> KVCache:
        if self._cache is None:
            dtype = self.model.get_input_embeddings().weight.dtype
            return init_cache(self.model.config, 1, bucket(max(length, MIN_COLUMNS)), dtype=dtype)
        return self._cache if length <= self._cache.capacity else grow(self._cache, bucket(length))


def after(arrays: Mapping[str, np.ndarray], known: int, config: Qwen3VLMoeConfig) -> dict[str, Any]:
    """What the processor returned for one conversation, less its first `known` tokens and the pictures and frames in them."""
    mask = arrays["attention_mask"][0] != 0
    ids = arrays["input_ids"][0][mask]
    out: dict[str, Any] = {"input_ids": ids[None, known:]}
    merge_unit = config.vision_config.merge_unit
    for token, pixels, grid in (
        (config.image_token_id, "pixel_values", "image_grid_thw"),
        (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        if grid in arrays:
            patches = int((ids[:known] == token).sum()) * merge_unit
            first = int(np.searchsorted(np.cumsum(arrays[grid].prod(axis=1)), patches, side="right"))
            if first < len(arrays[grid]):
                out[pixels], out[grid] = arrays[pixels][patches:], arrays[grid][first:]
    return out
