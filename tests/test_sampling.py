"""Drawing tokens: each cut and penalty against its definition and transformers' own, the draws against the exact distribution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax.errors import GenerationError
from qvlmoe_jax.sampling import Sampling, choose, mark, penalise, row_keys, warp

VOCAB, DRAWS = 40, 20_000
LOGITS = np.random.default_rng(3).normal(0, 2, VOCAB).astype(np.float32)

CUTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.6, "min_p": 0.04},
    "all": {"temperature": 1.8, "top_k": 20, "top_p": 0.9, "min_p": 0.04},
    "top_k above the vocabulary": {"temperature": 1.0, "top_k": 10 * VOCAB},
}


def exact(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The distribution by its definition, in float64."""
    p = np.exp((LOGITS.astype(np.float64) - LOGITS.max()) / temperature)
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[(before >= top_p) & (np.arange(VOCAB) > 0)]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def left(**options: Any) -> np.ndarray:
    """What `warp` leaves, as probabilities in the vocabulary's order."""
    logits, ids = warp(jnp.asarray(LOGITS)[None], Sampling.of(**options))
    probs = np.zeros(VOCAB)
    probs[np.arange(VOCAB) if ids is None else np.asarray(ids[0])] = np.asarray(jax.nn.softmax(logits[0]))
    return probs


@pytest.mark.parametrize("name", CUTS)
def test_what_is_left_after_the_cuts(name: str) -> None:
    np.testing.assert_allclose(left(**CUTS[name]), exact(**CUTS[name]), atol=1e-6)
    assert (left(**CUTS[name]) > 0).sum() == (exact(**CUTS[name]) > 0).sum()


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-300])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_next_to_no_temperature_is_the_likeliest(temperature: float, cut: dict[str, Any]) -> None:
    logits = jnp.asarray(np.stack([LOGITS, LOGITS[::-1], 100 + LOGITS, LOGITS - 100]))
    got = choose(logits, Sampling.of(temperature=temperature, **cut), 0, jnp.zeros((), jnp.int32))
    np.testing.assert_array_equal(got, np.argmax(logits, axis=1))


@pytest.mark.parametrize("name", CUTS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    """Pearson's chi-square: at 5 standard deviations above its mean a right sampler fails once in a million."""
    sampling = Sampling.of(**CUTS[name])
    draw = jax.jit(lambda step: choose(jnp.broadcast_to(LOGITS, (200, VOCAB)), sampling, 5, step))
    drawn = np.concatenate([np.asarray(draw(step)) for step in range(DRAWS // 200)])
    expected = DRAWS * exact(**CUTS[name])
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[expected == 0].any()
    likely = expected >= 5
    rest = expected[~likely].sum(), counts[~likely].sum()
    e, o = (np.append(values[likely], more) for values, more in zip((expected, counts), rest, strict=True))
    e, o = e[e > 0], o[e > 0]
    degrees = len(e) - 1
    assert degrees >= 3
    assert ((o - e) ** 2 / e).sum() < degrees + 5 * np.sqrt(2 * degrees)


def test_the_chi_square_test_would_see_a_small_mistake() -> None:
    """Draws at temperature 0.75 in place of 0.7 fail the same test."""
    p, q = exact(0.75), exact(0.7)
    assert DRAWS * ((p - q) ** 2 / q).sum() > 5 * np.sqrt(2 * VOCAB)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all"])
def test_cuts_are_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    options = CUTS[name]
    processors: Any = [hf.TemperatureLogitsWarper(options["temperature"])]
    if "top_k" in options:
        processors.append(hf.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(hf.MinPLogitsWarper(options["min_p"]))
    scores = hf.LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(LOGITS[None].copy()))
    np.testing.assert_allclose(left(**options), torch.softmax(scores, -1)[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_all_that_are_as_likely_as_the_kth_stay_in(k: int) -> None:
    """As in transformers: bfloat16 has many equal logits."""
    logits = np.array([[2, 1, 1, 1, 0, -1, 1, -2]], np.float32)
    kept, ids = warp(jnp.asarray(logits), Sampling.of(temperature=1.0, top_k=k))
    assert ids is not None
    found = set(np.asarray(ids)[np.isfinite(kept)].tolist())
    at_least = np.sort(logits[0])[-k]
    expected = np.flatnonzero(logits[0] >= at_least).tolist()
    assert found == set(expected[: 2 * k]) and len(found) >= k


def test_repetition_penalty_is_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    history = np.array([[3, 3, 8, 1, 30], [2, 9, 9, 9, 0]])
    logits = np.stack([LOGITS, LOGITS[::-1]])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.from_numpy(history), torch.from_numpy(logits.copy())).numpy()
    seen = mark(jnp.zeros((2, VOCAB), bool), jnp.asarray(history), jnp.ones((2, 5), bool))
    got = penalise(jnp.asarray(logits), Sampling.of(repetition_penalty=1.4), seen, None)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (expected != logits).sum() == 4 + 3


def test_presence_penalty_is_subtracted_once_from_what_the_answer_holds() -> None:
    answer = jnp.array([[3, 3, 8], [2, 0, 0]])
    valid = jnp.array([[True, True, True], [True, False, False]])
    generated = mark(jnp.zeros((2, VOCAB), bool), answer, valid)
    got = penalise(jnp.asarray(np.stack([LOGITS, LOGITS])), Sampling.of(presence_penalty=1.5), None, generated)
    change = np.zeros((2, VOCAB), np.float32)
    change[0, [3, 8]] = change[1, 2] = 1.5
    np.testing.assert_allclose(got, LOGITS - change, rtol=1e-6)


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    sampling = Sampling.of(temperature=1.0)
    others = np.random.default_rng(0).normal(0, 1, (7, VOCAB)).astype(np.float32)
    alone = choose(jnp.asarray(LOGITS)[None], sampling, 9, jnp.int32(4))
    assert choose(jnp.asarray(np.concatenate([LOGITS[None], others])), sampling, 9, jnp.int32(4))[0] == alone[0]


def test_every_row_step_and_seed_has_its_own_key() -> None:
    keys = [row_keys(seed, 3, jnp.int32(step)) for seed in range(3) for step in range(4)]
    data = {tuple(key) for rows in keys for key in np.asarray(jax.random.key_data(rows)).tolist()}
    assert len(data) == 3 * 3 * 4
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 1), 3)
    assert (jax.random.key_data(expected) == jax.random.key_data(keys[-1])[1]).all()


def test_values_do_not_recompile() -> None:
    draw: Any = jax.jit(lambda sampling: choose(jnp.asarray(LOGITS)[None], sampling, 0, jnp.int32(0)))
    for temperature, top_p in ((0.5, 0.9), (0.7, 0.8), (1.3, 0.1)):
        draw(Sampling.of(temperature=temperature, top_p=top_p))
    assert draw._cache_size() == 1
    assert Sampling.of(temperature=0, top_p=0.5, top_k=3) == Sampling(), "greedy needs no cut"


def test_values_may_be_numpys_and_jaxs() -> None:
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.5}
    of_numpy: dict[str, Any] = {name: np.asarray(value)[()] for name, value in options.items()}
    of_jax: dict[str, Any] = {name: jnp.asarray(value) for name, value in options.items()}
    assert Sampling.of(**of_numpy) == Sampling.of(**of_jax) == Sampling.of(temperature=0.5, top_k=3, top_p=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"temperature": None},
        {"temperature": "0.7"},
        {"temperature": [0.7, 0.8]},
        {"top_k": None},
        {"top_p": None},
        {"repetition_penalty": True},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(options: Any) -> None:
    (name,) = options
    values: Any = {"temperature": 1.0} | options
    with pytest.raises(GenerationError, match=rf"{name} = .*, expected "):
        Sampling.of(**values)
