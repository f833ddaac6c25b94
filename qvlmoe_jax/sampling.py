"""Choosing the next token from logits: penalties, temperature, top-k, top-p, min-p, in the order of HF's `generate`.

B rows, V vocab, C candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.arguments import is_number
from qvlmoe_jax.errors import GenerationError

_RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "temperature": (lambda value: value >= 0, "0 (greedy) or a positive number"),
    "top_k": (lambda value: value >= 0 and int(value) == value, "0 (all tokens) or a positive integer"),
    "top_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "a positive number (1 = none)"),
    "presence_penalty": (lambda value: True, "a finite number (0 = none)"),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How to choose. A pytree: what is None is absent from the compiled program, the numbers themselves never recompile it.

    Attributes:
      temperature: None = greedy, and then the three cuts below are None or 0 too.
      top_k: how many of the likeliest tokens to keep, 0 = all. Static: it is a shape.
      top_p: keep the likeliest tokens until their probability reaches it. min_p: keep tokens at least this fraction as likely
        as the likeliest.
      repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the answer so far.
      presence_penalty: is subtracted from the logits of tokens in the answer so far.
    """

    temperature: Any = None
    top_k: int = dataclasses.field(default=0, metadata={"static": True})
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    presence_penalty: Any = None

    @classmethod
    def of(
        cls,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
    ) -> Sampling:
        """From `generate`'s arguments, with whatever has no effect left out.

        Raises:
          GenerationError: a value out of its range.
        """
        for name, value in (
            ("temperature", temperature),
            ("top_k", top_k),
            ("top_p", top_p),
            ("min_p", min_p),
            ("repetition_penalty", repetition_penalty),
            ("presence_penalty", presence_penalty),
        ):
            good, expected = _RANGES[name]
            if not (is_number(value) and good(value)):
                raise GenerationError(f"{name} = {value!r}, expected {expected}")
        sampled = temperature > 0
        return cls(
            temperature=float(temperature) if sampled else None,
            top_k=int(top_k) if sampled else 0,
            top_p=float(top_p) if sampled and top_p < 1 else None,
            min_p=float(min_p) if sampled and min_p > 0 else None,
            repetition_penalty=float(repetition_penalty) if repetition_penalty != 1 else None,
            presence_penalty=float(presence_penalty) if presence_penalty != 0 else None,
        )


def mark(seen_BV: jax.Array, tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """`seen` with the valid tokens marked."""
    rows = jnp.arange(tokens_BT.shape[0])[:, None]
    return seen_BV.at[rows, jnp.where(valid_BT, tokens_BT, seen_BV.shape[1])].set(True, mode="drop")


def penalise(logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None, generated_BV: jax.Array | None) -> jax.Array:
    """float32 logits after the penalties. `seen` is needed with a repetition penalty, `generated` with a presence penalty."""
    logits = logits_BV.astype(jnp.float32)
    if sampling.repetition_penalty is not None:
        assert seen_BV is not None
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen_BV, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.presence_penalty is not None:
        assert generated_BV is not None
        logits = logits - jnp.where(generated_BV, sampling.presence_penalty, 0)
    return logits


def warp(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array | None]:
    """What is left to draw from after temperature, top-k, top-p and min-p.

    Returns:
      log-probabilities up to a constant `[B,C]`, -inf where cut, and the candidates' ids `[B,C]`; None = all ids in order.
      Only twice the top_k likeliest are ever sorted; of more that are as likely as the k-th, the later ids are cut.
    """
    # Below the likeliest, so that no division overflows: a temperature near 0 leaves the likeliest alone, not several infinities.
    below = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits, ids = below / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny), None
    V = logits.shape[-1]
    if sampling.top_k or sampling.top_p is not None:
        k = min(sampling.top_k or V, V)
        logits, ids = jax.lax.top_k(logits, min(2 * k, V))  # likeliest first
        # All that are as likely as the k-th stay in, as in transformers: in bfloat16 one position in five has such.
        logits = jnp.where(logits < logits[:, k - 1 : k], -jnp.inf, logits)
    if sampling.top_p is not None:
        probs = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        kept = (before < sampling.top_p).at[:, 0].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p is not None:
        # p >= min_p * max(p), in the log: no softmax needed
        logits = jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p), logits, -jnp.inf)
    return logits, ids


def row_keys(seed: jax.Array | int, num_rows: int, step: jax.Array) -> jax.Array:
    """One key per row, `fold_in(fold_in(seed, row), step)`: a row draws the same numbers whatever rows stand beside it."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(num_rows))


def choose(logits_BV: jax.Array, sampling: Sampling, seed: jax.Array | int, step: jax.Array) -> jax.Array:
    """The next token of each row, `[B]` int32, from penalised logits."""
    if sampling.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits, ids = warp(logits_BV, sampling)
    drawn = jax.vmap(jax.random.categorical)(row_keys(seed, logits.shape[0], step), logits)
    if ids is None:
        return drawn.astype(jnp.int32)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
