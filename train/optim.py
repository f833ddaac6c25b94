"""Optimizers on the stacked parameter tree, the learning-rate schedule, weight decay and freezing by name.

An optimizer here turns gradients into a direction; the step multiplies it by minus the learning rate. So the rate follows the
step number, and a skipped step leaves every moment as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.param_tree import flatten, nest
from train.config import OptimizerConfig, ScheduleConfig
from train.keeping import Keeping, keeping, scale_by_adam

PARTS = {
    "vision": r".*visual/(patch_embed|pos_embed|blocks)/.*",
    "merger": r".*visual/(merger|deepstack_merger_list)/.*",
    "text": r".*language_model/.*|lm_head/.*",
    "embeddings": r".*embed_tokens/.*|lm_head/.*",
    "experts": r".*mlp/experts/.*",
    "router": r".*mlp/gate/.*",
}
"""Names for `model.freeze`; anything else there is a regular expression of its own."""

# Which trailing dims of a matrix are its input and which its output, for Muon; the other dims count independent matrices
# (layers, experts, gate/up, q/k/v of the fused projection). What matches no row (embeddings, head, router, norms) uses Adam.
_MATRICES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    (r".*self_attn/[qkv]_proj/weight", (-3,), (-2, -1)),
    (r".*self_attn/o_proj/weight", (-3, -2), (-1,)),
    (r".*mlp/experts/gate_up_proj", (-3,), (-1,)),
    (r".*mlp/experts/down_proj", (-2,), (-1,)),
    (r".*mlp/(gate|up|down)_proj/weight", (-2,), (-1,)),
    (r".*blocks/attn/qkv/weight", (-4,), (-2, -1)),
    (r".*blocks/attn/proj/weight", (-3, -2), (-1,)),
    (r".*visual/.*/linear_fc[12]/weight", (-2,), (-1,)),
)

# Each gives the parameters below it a leading dim of their own.
_STACKS = (r"(^|/)(layers|blocks|deepstack_merger_list)/", r"(^|/)mlp/experts/")


def split_frozen(params: Mapping[str, Any], freeze: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(trained, frozen)`: two nested trees that together are `params`.

    Raises:
      ConfigError: a pattern that matches no parameter or is no regular expression, or nothing left to train.
    """
    flat = flatten(params)
    frozen: set[str] = set()
    for pattern in freeze:
        try:
            compiled = re.compile(PARTS.get(pattern, pattern))
        except re.error as error:
            raise ConfigError(f"model.freeze: {pattern!r} is not a regular expression ({error})") from None
        hits = {path for path in flat if compiled.fullmatch(path)}
        if not hits:
            raise ConfigError(
                f"model.freeze: {pattern!r} matches no parameter, expected one of {', '.join(PARTS)} or a regular expression "
                f"over paths such as {next(iter(flat))!r}"
            )
        frozen |= hits
    if len(frozen) == len(flat):
        raise ConfigError(f"model.freeze = {list(freeze)} leaves no parameter to train")
    return nest({p: a for p, a in flat.items() if p not in frozen}), nest({p: a for p, a in flat.items() if p in frozen})


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_frozen`."""
    return nest({**flatten(trained), **flatten(frozen)})


def schedule(config: ScheduleConfig, peak: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of step 0, 1, ... `steps` - 1.

    Warm-up reaches the peak at its last step (a step sooner than in transformers, whose step 0 has a rate of 0). A decay would
    reach its end at step `steps`, as in transformers and optax.
    """
    warmup, floor = config.warmup_steps, config.final_fraction
    decay = config.decay_steps if config.name == "wsd" and config.decay_steps is not None else max(1, steps - warmup)

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - (steps - decay)) / decay, 0, 1)  # of the decay; `decay` ends with the run
        if config.name == "constant":
            shape = jnp.ones(())
        elif config.name == "cosine":
            shape = floor + (1 - floor) * (1 + jnp.cos(math.pi * done)) / 2
        else:
            shape = floor + (1 - floor) * (1 - done)
        warm = jnp.minimum((step + 1) / warmup, 1) if warmup else 1.0
        return peak * shape * warm

    return rate


def decays(params: Mapping[str, Any]) -> dict[str, Any]:
    """True for what weight decay shrinks: matrices and tables, not norms' scales and biases."""
    return nest({p: not (p.endswith("/bias") or "norm" in p.split("/")[-2]) for p in flatten(params)})


def muon_dims(params: Any) -> Any:
    """`MuonDimensionNumbers` of each parameter of a nested dict; None where Adam is used. Masked leaves stay masked."""

    def of(path: str, leaf: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        for pattern, inputs, outputs in _MATRICES:
            if re.fullmatch(pattern, path):
                ndim = leaf.ndim
                return optax.contrib.MuonDimensionNumbers(tuple(ndim + i for i in inputs), tuple(ndim + i for i in outputs))
        return None

    return nest({path: of(path, leaf) for path, leaf in flatten(params).items()})


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon on the matrices, Adam on the rest. Updates are scaled by 0.2 * sqrt(larger side) (arXiv 2502.16982), the size of
    AdamW's, so AdamW's learning rates and weight decay carry over."""

    def match_rms(updates: Any, params: Any = None) -> Any:
        del params
        dims = flatten(muon_dims(updates))

        def scaled(path: str, leaf: Any) -> Any:
            if isinstance(leaf, optax.MaskedNode):
                return leaf
            sides = (math.prod(leaf.shape[i] for i in axes) for axes in dims[path])
            return leaf * (0.2 * max(sides) ** 0.5)

        return nest({path: scaled(path, leaf) for path, leaf in flatten(updates).items()})

    def labels(params: Mapping[str, Any]) -> dict[str, Any]:
        return nest({path: "adam" if dims is None else "muon" for path, dims in flatten(muon_dims(params)).items()})

    muon = optax.contrib.scale_by_muon(
        beta=0.95 if config.b1 is None else config.b1, mu_dtype=config.moment_dtype, weight_dimension_numbers=muon_dims
    )
    adam = optax.scale_by_adam(0.9, 0.95 if config.b2 is None else config.b2, config.eps, mu_dtype=config.moment_dtype)
    return optax.partition({"muon": optax.chain(muon, optax.stateless(match_rms)), "adam": adam}, labels)


def _clip_each_rms(updates: Any, params: Any = None) -> Any:
    """Each layer's (and expert's) update scaled down to a root mean square of 1 (arXiv 1804.04235, section 6).

    `optax.clip_by_block_rms` would take a stack for one parameter: a layer whose gradient jumps would then pass nearly unclipped,
    and shrink the updates of all others.
    """
    del params

    def clipped(path: str, leaf: jax.Array) -> jax.Array:
        stacked = sum(re.search(pattern, path) is not None for pattern in _STACKS)
        rms = jnp.sqrt(jnp.mean(jnp.square(leaf), axis=tuple(range(stacked, leaf.ndim)), keepdims=True))
        return leaf / jnp.maximum(1.0, rms)

    return nest({path: clipped(path, leaf) for path, leaf in flatten(updates).items()})


def make_optimizer(config: OptimizerConfig) -> Keeping:
    """The direction of descent with weight decay added: `params -= rate * direction`. Clipping is the step's."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=decays)
    b1, b2, moment = config.b1, config.b2, config.moment_dtype
    if config.name == "adamw":
        adam = scale_by_adam(0.9 if b1 is None else b1, 0.95 if b2 is None else b2, config.eps, moment)
        return Keeping(*optax.chain(adam, decay))  # decay has no state
    if config.name == "lion":
        scale = optax.scale_by_lion(0.9 if b1 is None else b1, 0.99 if b2 is None else b2, mu_dtype=moment)
    elif config.name == "muon":
        scale = _muon(config)
    else:
        scale = optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8 if b2 is None else b2),
            optax.stateless(_clip_each_rms),
            *([] if b1 is None else [optax.ema(b1, debias=False, accumulator_dtype=moment)]),
        )
    return keeping(optax.chain(scale, decay))
