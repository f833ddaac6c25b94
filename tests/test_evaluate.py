"""Exact match by one forward pass says what greedy decoding, one token at a time, would have written."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import cases, ours, tiny, tolerances, training
from tests.hf_checkpoints import random_hf_tensors
from tests.test_train_step import packed
from train.config import OptimizerConfig
from train.errors import TrainingError
from train.evaluate import make_evaluate, validate
from train.optim import make_optimizer
from train.state import init_state

CONFIG = tiny.UNIFORM
ANSWER = 4
PROMPTS = [
    [cases.Text(5), cases.Image(2, 2), cases.Text(3 + ANSWER)],
    [cases.Text(9 + ANSWER)],
    [cases.Image(1, 3), cases.Text(2), cases.Image(2, 1), cases.Text(4 + ANSWER)],
]


def test_exact_match_is_what_greedy_decoding_writes() -> None:
    model = ours.build_model(CONFIG, random_hf_tensors(CONFIG))
    inputs = cases.build(CONFIG, PROMPTS)
    batch = ours.make_batch(CONFIG, inputs, labels=np.full_like(inputs["input_ids"], -100))
    ids, labels = np.array(batch.input_ids), np.array(batch.labels)
    ends = cases.valid(inputs).sum(1)
    forward = jax.jit(lambda m, b: jnp.argmax(m(b).logits, axis=-1))
    for offset in range(ANSWER):  # decode by whole forward passes, writing each row's next token into its place
        likeliest = np.asarray(forward(model, dataclasses.replace(batch, input_ids=ids.copy())))
        for row, end in enumerate(ends):
            ids[row, end - ANSWER + offset] = likeliest[row, end - ANSWER + offset - 1]
    special = {CONFIG[key] for key in ("image_token_id", "video_token_id")}
    for row, end in enumerate(ends):
        labels[row, end - ANSWER : end] = ids[row, end - ANSWER : end]
        assert not special & set(labels[row, end - ANSWER : end].tolist())

    state = init_state(jax.tree.map(jnp.copy, model.params()), make_optimizer(OptimizerConfig()), freeze=("vision",))
    evaluate = make_evaluate(model, chunk_tokens=32, compute_dtype=jnp.float32)

    def scores(ids: np.ndarray, labels: np.ndarray, pack: bool = False) -> dict[str, float]:
        whole = dataclasses.replace(batch, input_ids=ids, labels=labels)
        return validate(evaluate, state, [training.stacked([packed(whole) if pack else whole])])

    right = scores(ids, labels)
    assert (right["exact_match"], right["token_accuracy"], right["answers"]) == (1, 1, 3)
    # one other token in one answer: greedy decoding would have written something else there
    wrong_ids, wrong = ids.copy(), labels.copy()
    place = (1, ends[1] - 2)
    wrong_ids[place] = wrong[place] = (ids[place] + 1) % 200
    one_wrong = scores(wrong_ids, wrong)
    assert one_wrong["exact_match"] == pytest.approx(2 / 3)
    assert one_wrong["token_accuracy"] < 1 and one_wrong["validation_loss"] > right["validation_loss"]
    together = scores(wrong_ids, wrong, pack=True)
    assert together["exact_match"] == pytest.approx(2 / 3)
    assert together["validation_loss"] == pytest.approx(one_wrong["validation_loss"], rel=tolerances.SAME_LOSS)


def test_validation_data_without_answers_are_refused() -> None:
    sums = {"tokens": 0.0, "cross_entropy": 0.0, "answers": 0.0, "right": 0.0, "correct": 0.0}

    def evaluate(*_: Any) -> dict[str, jax.Array]:
        return {key: jnp.float32(value) for key, value in sums.items()}

    state: Any = type("State", (), {"params": {}, "frozen": {}, "router_bias": None})
    for batches in ([], [None]):
        with pytest.raises(TrainingError, match="no target token"):
            validate(evaluate, state, batches)  # pyright: ignore[reportArgumentType]
