"""Prompts with placeholders to token ids: as many placeholder ids as there are visual tokens, timestamps before each frame."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qvlmoe_jax.errors import ProcessorError
from qvlmoe_jax.tokenizer import Tokenizer

VideoPrompt = Literal["replaced", "wrapped"]
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class VisionTokens:
    """The texts of the four special tokens around pictures and videos."""

    image: str
    video: str
    start: str
    end: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> VisionTokens:
        """tokenizer_config.json may name them (`image_token`, ...); else the released models' names."""
        extra = tokenizer.config.get("extra_special_tokens")

        def named(key: str, default: str) -> str:
            value = tokenizer.config.get(key) or (extra.get(key) if isinstance(extra, Mapping) else None) or default
            value = value.get("content") if isinstance(value, Mapping) else value
            if not isinstance(value, str):
                raise ProcessorError(f"tokenizer_config.json: {key} is {value!r}, expected the text of a token")
            return value

        return cls(
            image=named("image_token", "<|image_pad|>"),
            video=named("video_token", "<|video_pad|>"),
            start=named("vision_start_token", "<|vision_start|>"),
            end=named("vision_end_token", "<|vision_end|>"),
        )


@dataclass(frozen=True)
class VideoTokens:
    """timestamps: seconds of each temporal patch. tokens: visual tokens of one."""

    timestamps: Sequence[float]
    tokens: int


def prompt_ids(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    image_tokens: Sequence[int],
    videos: Sequence[VideoTokens],
    *,
    video_prompt: VideoPrompt,
) -> list[np.ndarray]:
    """Ids `[n]` int64 of each prompt.

    A run of placeholders is tokenized as one and repeated afterwards: it is a special token, which the tokenizer cuts out
    before it looks at anything else, and a large picture has thousands.

    Args:
      image_tokens: visual tokens of each picture; pictures and videos in reading order over all prompts.
      video_prompt: what becomes of vision_start and vision_end around a video's placeholder, see `Processor`.
    Raises:
      ProcessorError: more or fewer placeholders than pictures or videos.
    """
    marks = VisionTokens.of(tokenizer)
    for kind, mark, given in (("pictures", marks.image, len(image_tokens)), ("videos", marks.video, len(videos))):
        found = sum(prompt.count(mark) for prompt in prompts)
        if found != given:
            raise ProcessorError(
                f"the conversations hold {given} {kind}, but their text has {found} placeholders {mark}; expected one each "
                "(pictures belong in user or tool messages, and the placeholder itself in no text)"
            )
    waiting = iter(videos)

    def frames(_: re.Match[str]) -> str:
        return "".join(f"<{seconds:.1f} seconds>{marks.start}{marks.video}{marks.end}" for seconds in next(waiting).timestamps)

    alone = re.escape(marks.video)
    replaced = re.escape(marks.start + marks.video + marks.end) + "|" + alone
    texts = [re.sub(replaced if video_prompt == "replaced" else alone, frames, prompt) for prompt in prompts]
    bos = tokenizer.special_tokens.get("bos_token")
    ids = tokenizer.encode(texts, add_special_tokens=not (bos and texts[0].startswith(bos)))
    counts = {
        tokenizer.id_of(marks.image): iter(image_tokens),
        tokenizer.id_of(marks.video): (video.tokens for video in videos for _ in video.timestamps),
    }
    return [_repeat(row, counts) for row in ids]


def padded(rows: Sequence[np.ndarray], pad: int, side: str) -> dict[str, np.ndarray]:
    """input_ids and attention_mask `[B,L]` int64, L the longest row."""
    if side not in ("left", "right"):
        raise ProcessorError(f"padding_side is {side!r}, expected 'left' or 'right'")
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, where] = row
        mask[b, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _repeat(ids: np.ndarray, counts: Mapping[int | None, Iterator[int]]) -> np.ndarray:
    repeats = np.ones(len(ids), np.int64)
    for token, waiting in counts.items():
        if token is not None:
            where = np.flatnonzero(ids == token)
            repeats[where] = [next(waiting) for _ in where]
    return np.repeat(ids, repeats)
