"""Greedy generation is token for token that of `transformers.generate`; what the cache holds is what a full forward computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.cache import init_cache
from qvlmoe_jax.generate import generate
from qvlmoe_jax.incremental import decode_step, prefill
from tests import ours, prompts, reference, tiny
from tests.cases import Inputs
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import LOGITS

NEW = 64


@dataclass
class Pair:
    """The same weights, here and in transformers."""

    config: dict[str, Any]
    model: Qwen3VLMoeForConditionalGeneration
    theirs: Any

    @classmethod
    def of(cls, name: str) -> Pair:
        config = tiny.ALL[name]
        tensors = random_hf_tensors(config)
        return cls(config, ours.build_model(config, tensors), reference.build_model(config, tensors))

    def batch(self, inputs: Inputs) -> Batch:
        """One static shape for every prompt, so that a config compiles once."""
        unit = self.model.config.vision_config.merge_unit
        return Batch.from_hf(self.model.config, **inputs, text_length=64, vision_rows=4, row_patches=16 * unit)

    def answer(self, inputs: Inputs, **options: Any) -> np.ndarray:
        return generate(self.model, self.batch(inputs), **({"max_new_tokens": NEW, "eos_token_id": ()} | options))

    def expected(self, inputs: Inputs, new: int = NEW, **options: Any) -> np.ndarray:
        self.theirs.model.rope_deltas = None
        self.theirs.generation_config.eos_token_id = None
        torch_inputs = {key: reference.to_torch(value) for key, value in inputs.items()}
        out = self.theirs.generate(**torch_inputs, max_new_tokens=new, do_sample=False, **({"pad_token_id": 0} | options))
        return out.numpy()[:, inputs["input_ids"].shape[1] :]

    def row(self, name: str, seed: int = 0) -> Inputs:
        return prompts.row(self.config, name, seed)


@pytest.fixture(scope="module")
def tiny_pair() -> Pair:
    return Pair.of("tiny")


OFTEN, SELDOM = ("mixed",), ("other", "dense", "irregular", "tied", "hf_test", "no_deepstack")


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(name, marks=pytest.mark.slow) for name in OFTEN),
        *(pytest.param(name, marks=pytest.mark.soak) for name in SELDOM),
    ],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair.of(request.param)


UNEQUAL = (("text", "mixed"), ("image", "long text"), ("video", "two images"), ("one token", "adjacent images"))


def check_all(pair: Pair) -> None:
    """Every row alone, rows of unequal length side by side, both whole and in chunks that end inside pictures."""
    alone = {}
    for seed, name in enumerate(prompts.ROWS):
        inputs = prompts.batch([[pair.row(name, seed)]])
        alone[name] = pair.expected(inputs)
        np.testing.assert_array_equal(pair.answer(inputs), alone[name], err_msg=name)
        np.testing.assert_array_equal(pair.answer(inputs, prefill_chunk=5), alone[name], err_msg=f"{name}, in chunks")
    seeds = {name: seed for seed, name in enumerate(prompts.ROWS)}
    for names in UNEQUAL:
        inputs = prompts.batch([[pair.row(name, seeds[name])] for name in names])
        side_by_side = pair.answer(inputs)
        np.testing.assert_array_equal(side_by_side, pair.expected(inputs), err_msg=str(names))
        np.testing.assert_array_equal(side_by_side, np.concatenate([alone[name] for name in names]), err_msg=str(names))
        np.testing.assert_array_equal(pair.answer(inputs, prefill_chunk=5), side_by_side, err_msg=str(names))


def test_a_batch_of_unequal_rows(tiny_pair: Pair) -> None:
    inputs = prompts.batch([[tiny_pair.row("image")], [tiny_pair.row("mixed")]])
    expected = tiny_pair.expected(inputs)
    assert len(np.unique(expected)) > 10, "a model that repeats itself tests little"
    np.testing.assert_array_equal(tiny_pair.answer(inputs), expected)


def test_chunks_that_end_inside_pictures(tiny_pair: Pair) -> None:
    inputs = prompts.batch([[tiny_pair.row("two images")], [tiny_pair.row("video")]])
    ids = inputs["input_ids"]
    visual = np.isin(ids, (tiny_pair.config["image_token_id"], tiny_pair.config["video_token_id"]))
    assert (visual[:, 4:-1:5] & visual[:, 5::5]).any(axis=1).all(), "in each row some chunk of 5 ends inside a picture"
    np.testing.assert_array_equal(tiny_pair.answer(inputs, prefill_chunk=5), tiny_pair.expected(inputs))


@pytest.mark.slow
def test_every_prompt(tiny_pair: Pair) -> None:
    check_all(tiny_pair)


def test_every_prompt_of_every_kind_of_model(pair: Pair) -> None:
    check_all(pair)


def test_right_padding_changes_nothing(tiny_pair: Pair) -> None:
    rows = [tiny_pair.row("image"), tiny_pair.row("mixed")]
    left = prompts.batch([[row] for row in rows])
    right = {**left, "input_ids": left["input_ids"].copy(), "attention_mask": left["attention_mask"].copy()}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        first = int(left["attention_mask"][0].argmax())
        right[key] = np.stack([np.roll(left[key][0], -first), left[key][1]])
    assert not right["attention_mask"][0, -1]
    np.testing.assert_array_equal(tiny_pair.answer(right), tiny_pair.answer(left))


TURNS = (("image", "text"), ("text", "two images"), ("long text", "one token"))


@pytest.mark.parametrize("chunk", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_follow_up_turns_reuse_the_cache(tiny_pair: Pair, chunk: int | None) -> None:
    """Two rows with three turns each, pictures in different ones; transformers reads the whole conversation anew."""
    turns = [[tiny_pair.row(name, seed=10 * t + r) for r, name in enumerate(names)] for t, names in enumerate(TURNS)]
    cache = init_cache(tiny_pair.model.config, 2, 512)
    conversations: list[list[Inputs]] = [[], []]
    for turn in turns:
        answer = tiny_pair.answer(prompts.batch([[row] for row in turn]), cache=cache, max_new_tokens=20, prefill_chunk=chunk)
        for conversation, row in zip(conversations, turn, strict=True):
            conversation.append(row)
        np.testing.assert_array_equal(answer, tiny_pair.expected(prompts.batch(conversations), new=20))
        for conversation, ids in zip(conversations, answer, strict=True):
            conversation.append(prompts.plain(ids))
    whole = prompts.batch(conversations)
    held = [row[row >= 0] for row in np.asarray(cache.tokens)]
    for row, ids, mask in zip(held, whole["input_ids"], whole["attention_mask"], strict=True):
        np.testing.assert_array_equal(row, ids[mask != 0])


def test_logits_of_each_step_are_those_of_the_full_forward(tiny_pair: Pair, record: Any) -> None:
    inputs = prompts.batch([[tiny_pair.row("image")], [tiny_pair.row("mixed")]])
    answer = tiny_pair.expected(inputs, new=32)
    tail = {"input_ids": answer, "attention_mask": np.ones_like(answer), "mm_token_type_ids": np.zeros_like(answer)}
    whole = inputs | {key: np.concatenate([inputs[key], value], axis=1) for key, value in tail.items()}
    full = ours.forward(tiny_pair.model, ours.make_batch(tiny_pair.config, whole, text_length=128))
    theirs = reference.logits(tiny_pair.theirs, whole)
    step = jax.jit(decode_step, donate_argnums=2)
    cache = init_cache(tiny_pair.model.config, 2, 128)
    logits, cache = jax.jit(prefill, donate_argnums=2)(tiny_pair.model, tiny_pair.batch(inputs), cache)
    first = inputs["input_ids"].shape[1] - 1
    for i in range(answer.shape[1]):
        if i:
            logits, cache = step(tiny_pair.model, answer[:, i - 1].astype(np.int32), cache)
        for name, expected in (("full forward", np.asarray(full)), ("transformers", theirs)):
            error = np.abs(np.asarray(logits) - expected[:, first + i]).max()
            record(f"max |decode logits - {name}|", error)
            assert error <= LOGITS, (name, i)


def test_rows_end_at_their_stop_token(tiny_pair: Pair) -> None:
    inputs = prompts.batch([[tiny_pair.row("image")], [tiny_pair.row("mixed")]])
    free = tiny_pair.answer(inputs)
    stop = int(free[0, 6])
    ends = [int(np.flatnonzero(row == stop)[0]) if stop in row else NEW for row in free]
    assert ends[0] <= 6 and ends[1] != ends[0]
    unused, pad = np.setdiff1d(np.arange(250), free)[:2]
    answer = tiny_pair.answer(inputs, eos_token_id=[stop, unused], pad_token_id=int(pad))
    theirs = tiny_pair.expected(inputs, eos_token_id=[stop, int(unused)], pad_token_id=int(pad))
    np.testing.assert_array_equal(answer[:, : theirs.shape[1]], theirs)
    for row, expected, end in zip(answer, free, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == pad).all()


def test_a_row_that_ended_goes_on_in_the_next_turn(tiny_pair: Pair) -> None:
    """The pads after its end are not part of the conversation."""
    first, second = [[tiny_pair.row(name, t) for name in names] for t, names in enumerate((("image", "mixed"), ("text", "text")))]
    inputs = prompts.batch([[row] for row in first])
    stop = int(tiny_pair.answer(inputs)[0, 6])
    cache = init_cache(tiny_pair.model.config, 2, 256)
    answer = tiny_pair.answer(inputs, cache=cache, eos_token_id=stop, pad_token_id=254, max_new_tokens=20)
    kept = [row[: int(np.argmax(row == stop)) + 1] if stop in row else row for row in answer]
    assert len(kept[0]) < len(kept[1])
    got = tiny_pair.answer(prompts.batch([[row] for row in second]), cache=cache, max_new_tokens=20)
    whole = prompts.batch([[a, prompts.plain(ids), b] for a, ids, b in zip(first, kept, second, strict=True)])
    np.testing.assert_array_equal(got, tiny_pair.expected(whole, new=20))


def test_streaming_gives_the_same_tokens(tiny_pair: Pair) -> None:
    inputs = prompts.batch([[tiny_pair.row("image")], [tiny_pair.row("mixed")]])
    seen: list[np.ndarray] = []
    answer = tiny_pair.answer(inputs, on_token=seen.append)
    np.testing.assert_array_equal(np.stack(seen, axis=1), answer)
    np.testing.assert_array_equal(answer, tiny_pair.answer(inputs))
    seen.clear()
    stop = sorted({int(answer[0, 3]), int(answer[1, 5])})
    stopped = tiny_pair.answer(inputs, on_token=seen.append, eos_token_id=stop, pad_token_id=0)
    assert len(seen) <= 6, "nothing is made after every row has ended"
    np.testing.assert_array_equal(np.stack(seen, axis=1), stopped[:, : len(seen)])
    assert not stopped[:, len(seen) :].any()


def test_repetition_penalty_is_transformers(tiny_pair: Pair) -> None:
    inputs = prompts.batch([[tiny_pair.row("image")]])
    got = tiny_pair.answer(inputs, repetition_penalty=1.7)
    np.testing.assert_array_equal(got, tiny_pair.expected(inputs, repetition_penalty=1.7))
    assert (got != tiny_pair.answer(inputs)).any()
