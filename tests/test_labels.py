"""Which tokens are learnt, held against the text they come from."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qvlmoe_jax.batch import IGNORED_LABEL
from tests.data_cases import picture, processor
from train.labels import TurnTokens, assistant_labels

TOKENS = TurnTokens.of(processor().tokenizer)


def learnt(messages: list[dict[str, Any]], *, label_newline: bool = False) -> list[str]:
    """The text of each run of learnt tokens."""
    ids = processor().encode([messages], add_generation_prompt=False)["input_ids"][0]
    labels = assistant_labels(ids, TOKENS, label_newline=label_newline)
    kept = labels != IGNORED_LABEL
    assert np.array_equal(labels[kept], ids[kept])
    starts = np.flatnonzero(kept & ~np.r_[False, kept[:-1]])
    ends = np.flatnonzero(kept & ~np.r_[kept[1:], False]) + 1
    return [processor().decode(ids[a:b], skip_special_tokens=False) for a, b in zip(starts, ends, strict=True)]


def chat(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_only_answers_and_their_end_are_learnt() -> None:
    messages = [{"role": "system", "content": "be brief"}, *chat("what is it?", "red", "sure?", "yes")]
    assert learnt(messages) == ["red<|im_end|>", "yes<|im_end|>"]
    assert learnt(messages, label_newline=True) == ["red<|im_end|>\n", "yes<|im_end|>\n"]


def test_pictures_are_not_learnt() -> None:
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "what is it?"}]
    assert learnt([{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]) == ["red<|im_end|>"]


def test_the_word_assistant_starts_nothing() -> None:
    assert learnt(chat("assistant\nassistant", "assistant\n no", "user", "ok")) == ["assistant\n no<|im_end|>", "ok<|im_end|>"]


def test_an_answer_may_begin_with_newlines() -> None:
    assert learnt(chat("a", "\n\nred", "b", "yes")) == ["\n\nred<|im_end|>", "yes<|im_end|>"]
    # Qwen's vocabulary joins newlines: then the header's token holds the answer's newlines too, which are not its to learn.
    joined, red = 1000, 1001
    ids = np.array([TOKENS.im_start, *TOKENS.assistant, joined, red, TOKENS.im_end])
    assert assistant_labels(ids, TOKENS).tolist() == [*[IGNORED_LABEL] * (len(ids) - 2), red, TOKENS.im_end]


def test_a_turn_without_its_end_is_not_learnt() -> None:
    ids = processor().encode([chat("a", "red", "b")], add_generation_prompt=True)["input_ids"][0]
    cut = ids[: np.flatnonzero(ids == TOKENS.im_end)[1]]  # inside the first answer
    assert np.all(assistant_labels(cut, TOKENS) == IGNORED_LABEL)
    assert np.sum(assistant_labels(ids, TOKENS) != IGNORED_LABEL) == 2
    assert np.all(assistant_labels(ids[:0], TOKENS) == IGNORED_LABEL)


words = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)


@given(st.lists(words, min_size=2, max_size=7), st.booleans())
def test_any_chat(contents: list[str], newline: bool) -> None:
    end = "<|im_end|>\n" if newline else "<|im_end|>"
    answers = [unicodedata.normalize("NFC", answer) + end for answer in contents[1::2]]
    assert learnt(chat(*contents), label_newline=newline) == answers
