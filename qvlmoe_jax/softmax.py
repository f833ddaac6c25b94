"""What the kernels of attention share: how a key is hidden, and a softmax over keys that come some at a time.

(Online softmax: Milakov and Gimelshein, arXiv 1805.02867.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

HIDDEN = float(jnp.finfo(jnp.float32).min) / 2
"""The score of a key that a query does not see, or what is added to it. No other score comes near it."""


def running_softmax(largest: jax.Array, total: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
    """One step, with W more keys.

    Args:
      largest, total: `[...]`, of the keys so far: the largest score (at first `HIDDEN`) and the sum of weights (at first 0).
      scores: `[...,W]`, float32.
    Returns:
      the new largest and total, the weights `[...,W]` of these keys, and the factor `[...]` of what was summed before.
    """
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
    # Half of what hides: where nothing was seen yet, hidden scores still become 0.
    weights = jnp.exp(scores - jnp.maximum(new_largest, HIDDEN / 2)[..., None])
    shrink = jnp.exp(largest - new_largest)
    return new_largest, total * shrink + jnp.sum(weights, axis=-1), weights, shrink
