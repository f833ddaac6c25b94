"""Known bugs of other ports, switched on one at a time: each must move the logits far beyond the parity tests' tolerance.

A bug is a change of the weights, of the Batch, or of one function; the answers are compared with transformers', whose logits
the model without the bug meets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

from transformers import vision_utils

from qvlmoe_jax import Batch, Qwen3VLMoeConfig, layers, moe, rope, text, vision
from qvlmoe_jax.layers import LayerNorm
from qvlmoe_jax.param_tree import flatten, nest
from tests import cases, ours, reference, tiny
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import ABLATION, LOGITS, MODULE

CONFIG = tiny.TINY
TAPS = CONFIG["vision_config"]["deepstack_visual_indexes"]
MERGE = CONFIG["vision_config"]["spatial_merge_size"]
# Clips, a picture between them, and padding on the left, in 31 merged patches: all frames fit one vision row.
ROWS = [[Text(3), Video(3, 2, 3), Text(4), Image(3, 1), Text(3)], [Text(2), Image(2, 4), Text(2), Video(2, 1, 1), Text(9)]]


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    tensors = random_hf_tensors(CONFIG)
    inputs = cases.build(CONFIG, ROWS, padding="left")
    batch = ours.make_batch(CONFIG, inputs)
    assert not batch.patch_segment_ids[0, 1:].any(), "the bug of attending across frames needs them in one row"
    return SimpleNamespace(
        inputs=inputs,
        batch=batch,
        model=ours.build_model(CONFIG, tensors),
        expected=reference.logits(reference.build_model(CONFIG, tensors), inputs),
    )


def change(subject: SimpleNamespace, forward: Callable[..., Any], params: dict[str, Any] | None = None, **fields: Any) -> float:
    """Largest difference from transformers at a valid position."""
    model = subject.model if params is None else subject.model.with_params(params)
    logits = np.asarray(forward(model, dataclasses.replace(subject.batch, **fields)))
    return float(np.abs(logits[:, : subject.expected.shape[1]] - subject.expected)[cases.valid(subject.inputs)].max())


def test_without_a_bug_the_logits_agree(subject):
    assert change(subject, ours.forward) <= LOGITS


# --- bugs in the weights ---------------------------------------------------------------------------------------------------


def edit(model: Any, pattern: str, edited: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """The parameters with every array whose path contains `pattern` edited."""
    flat = flatten(model.params())
    hits = [path for path in flat if pattern in path]
    assert hits, pattern
    return nest(flat | {path: jnp.asarray(edited(np.asarray(flat[path]))) for path in hits})


def interleave(gate_up: np.ndarray) -> np.ndarray:
    """`[..., 2, F]` as if the file held gate 0, up 0, gate 1, up 1, ..."""
    *lead, two, width = gate_up.shape
    return gate_up.reshape(*lead, width, two).swapaxes(-1, -2)


def qkv_by_head(qkv: np.ndarray) -> np.ndarray:
    """`[..., 3, N, H]` as if the file held q, k, v of head 0, then of head 1, ..."""
    *lead, three, heads, width = qkv.shape
    return qkv.reshape(*lead, heads, three, width).swapaxes(-2, -3)


def tile_kv(model: Any) -> dict[str, Any]:
    """Query head n reads kv head n % K instead of n // G: the same as moving the heads of q and o."""
    heads, kv_heads = CONFIG["text_config"]["num_attention_heads"], CONFIG["text_config"]["num_key_value_heads"]
    order = [n for kv in range(kv_heads) for n in range(heads) if n % kv_heads == kv]
    moved = edit(model, "self_attn/q_proj", lambda w: w[..., order, :])
    return edit(model.with_params(moved), "self_attn/o_proj", lambda w: w[..., order, :, :])


WEIGHTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gate and up swapped": lambda model: edit(model, "experts/gate_up_proj", lambda w: w[..., ::-1, :]),
    "gate and up interleaved": lambda model: edit(model, "experts/gate_up_proj", interleave),
    "qkv interleaved per head": lambda model: edit(model, "attn/qkv", qkv_by_head),
    "kv heads tiled, not grouped": tile_kv,
    "no deepstack": lambda model: edit(model, "deepstack_merger_list/linear_fc2", np.zeros_like),
}


@pytest.mark.parametrize("bug", WEIGHTS)
def test_bugs_in_the_weights(subject, bug, record):
    moved = change(subject, ours.forward, WEIGHTS[bug](subject.model))
    record(f"ablation: {bug}", moved)
    assert moved > ABLATION


# --- bugs in what the host computes -----------------------------------------------------------------------------------------


def per_frame(batch: Batch, field: str, compute: Callable[[int, int, int, int], np.ndarray]) -> np.ndarray:
    """`field` recomputed for each frame by `compute(index, height, width, patches)`."""
    out = np.array(getattr(batch, field))
    for frame in range(1, int(batch.patch_segment_ids.max()) + 1):
        where = batch.patch_segment_ids == frame
        height, width = batch.patch_coords[where].max(0) + 1
        out[where] = compute(frame, int(height), int(width), int(where.sum()))
    return out


def raster(height: int, width: int) -> np.ndarray:
    return np.stack(np.divmod(np.arange(height * width), width), -1)


def taps(batch: Batch, *, align_corners: bool, merge: int) -> dict[str, np.ndarray]:
    """The position table's entries and weights as transformers computes them with these options."""
    import torch

    def both(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        found = vision_utils.get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, height, width]]),
            num_grid_per_side=Qwen3VLMoeConfig.from_hf(CONFIG).vision_config.num_grid_per_side,
            mode="bilinear",
            align_corners=align_corners,
            spatial_merge_size=merge,
        )
        return found[0].numpy(), found[1].numpy()

    return {
        "pos_index": per_frame(batch, "pos_index", lambda _, h, w, n: both(h, w)[0]),
        "pos_weight": per_frame(batch, "pos_weight", lambda _, h, w, n: both(h, w)[1]),
    }


def by_kind(batch: Batch, inputs: cases.Inputs) -> np.ndarray:
    """Visual tokens dealt out pictures first, then clips, instead of in the order of the sequence."""
    visual, types = batch.visual_index >= 0, np.zeros_like(batch.visual_index)
    types[:, : inputs["input_ids"].shape[1]] = inputs["mm_token_type_ids"]
    out = np.array(batch.visual_index)
    given = np.concatenate([batch.visual_index[types == kind] for kind in (1, 2)])
    out[visual] = given
    return out


def one_dimensional(batch: Batch) -> np.ndarray:
    positions = np.maximum(np.cumsum(batch.segment_ids > 0, axis=1) - 1, 0)
    return np.broadcast_to(positions, batch.position_ids.shape).astype(np.int32)


HOST: dict[str, Callable[[SimpleNamespace], dict[str, Any]]] = {
    "1-D positions": lambda s: {"position_ids": one_dimensional(s.batch)},
    "attention over the whole clip": lambda s: {
        "patch_segment_ids": np.select(
            [np.isin(s.batch.patch_segment_ids, clip) for clip in ((1, 2, 3), (6, 7))], [1, 6], s.batch.patch_segment_ids
        )
    },
    "attention over the whole batch": lambda s: {"patch_segment_ids": np.minimum(s.batch.patch_segment_ids, 1)},
    "attention to padding": lambda s: {"segment_ids": np.ones_like(s.batch.segment_ids)},
    "position table without align_corners": lambda s: taps(s.batch, align_corners=False, merge=MERGE),
    "position table in raster order": lambda s: taps(s.batch, align_corners=True, merge=1),
    "vision rotary in raster order": lambda s: {
        "patch_coords": per_frame(s.batch, "patch_coords", lambda _, h, w, n: raster(h, w))
    },
    "vision rotary with rows and columns swapped": lambda s: {"patch_coords": s.batch.patch_coords[..., ::-1].copy()},
    "pictures before clips": lambda s: {"visual_index": by_kind(s.batch, s.inputs)},
}


@pytest.mark.parametrize("bug", HOST)
def test_bugs_on_the_host(subject, bug, record):
    moved = change(subject, ours.forward, **HOST[bug](subject))
    record(f"ablation: {bug}", moved)
    assert moved > ABLATION


# --- bugs in a function of the network ----------------------------------------------------------------------------------------


def gelu_variant(*, replaced: bool, by: bool) -> Callable[..., jax.Array]:
    """The tanh GELU (True) or the exact one (False) computed as the other."""
    return lambda x, *, approximate: layers.gelu(x, approximate=by if approximate is replaced else approximate)


def unnormalised_route(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    probs = jax.nn.softmax(logits, axis=-1)
    weights, experts = jax.lax.top_k(probs, k)
    return probs, weights, experts


def chunked_axis(mrope_section: tuple[int, ...], half: int) -> np.ndarray:
    """T T ... H H ... W W, as Qwen2-VL lays them out."""
    return np.repeat(np.arange(3), mrope_section)[:half]


def norm_after_rotation(self: text.Qwen3VLMoeTextAttention, x: jax.Array, rotary: Any, segment_ids: jax.Array) -> jax.Array:
    q, k = (norm(rope.rotate(proj(x), *rotary)) for norm, proj in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj)))
    out = text.attention(q, k, self.v_proj(x), segment_ids=segment_ids, causal=True, backend=self.backend)
    return self.o_proj(out)


def norm_before_the_shuffle(self: vision.Qwen3VLMoeVisionPatchMerger, x: jax.Array) -> jax.Array:
    """Statistics per patch, as in the main merger, for every merger."""
    mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    x = ((x - mean) * jax.lax.rsqrt(variance + layers.LAYER_NORM_EPS)).reshape(*x.shape[:-2], -1, self.merge_unit * x.shape[-1])
    repeat = x.shape[-1] // self.norm.weight.shape[0]
    x = x * jnp.tile(self.norm.weight[...], repeat) + jnp.tile(self.norm.bias[...], repeat)
    return self.linear_fc2(layers.gelu(self.linear_fc1(x), approximate=False))


def moved_deepstack(move: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """The decoder called with other embeddings and DeepStack levels."""
    decoder = text.Qwen3VLMoeTextModel.__call__

    def call(self: text.Qwen3VLMoeTextModel, *args: Any, inputs_embeds: jax.Array, deepstack: jax.Array, **kwargs: Any) -> Any:
        inputs_embeds, deepstack = move(inputs_embeds, deepstack)
        return decoder(self, *args, inputs_embeds=inputs_embeds, deepstack=deepstack, **kwargs)

    return call


def at_vision_indexes(x: jax.Array, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, jnp.zeros((max(TAPS) + 1, *levels.shape[1:])).at[jnp.array(TAPS)].set(levels)


def before_the_layer(x: jax.Array, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x + levels[0], levels[1:]


FUNCTIONS: dict[str, tuple[Any, str, Any, float]] = {
    # the two GELUs differ by less than 5e-4 themselves
    "merger with the tanh GELU": (vision, "gelu", gelu_variant(replaced=False, by=True), 2 * LOGITS),
    "vision MLP with the exact GELU": (vision, "gelu", gelu_variant(replaced=True, by=False), 2 * LOGITS),
    "deepstack at the vision indexes": (text.Qwen3VLMoeTextModel, "__call__", moved_deepstack(at_vision_indexes), ABLATION),
    "deepstack before the layer": (text.Qwen3VLMoeTextModel, "__call__", moved_deepstack(before_the_layer), ABLATION),
    "deepstack normed before the shuffle": (vision.Qwen3VLMoeVisionPatchMerger, "__call__", norm_before_the_shuffle, ABLATION),
    "M-RoPE chunked": (rope, "mrope_axis", chunked_axis, ABLATION),
    "top-k weights not renormalised": (moe, "route", unnormalised_route, ABLATION),
    "qk-norm after the rotation": (text.Qwen3VLMoeTextAttention, "__call__", norm_after_rotation, ABLATION),
}


@pytest.mark.parametrize("bug", FUNCTIONS)
def test_bugs_in_the_network(subject, bug, record, monkeypatch):
    owner, name, replacement, at_least = FUNCTIONS[bug]
    monkeypatch.setattr(owner, name, replacement)
    moved = change(subject, jax.jit(lambda model, batch: model(batch).logits))
    record(f"ablation: {bug}", moved)
    assert moved > at_least


def test_layer_norm_eps(monkeypatch):
    """1e-5 for 1e-6 moves the logits by 1.5e-6 only; the module test sees it, since its variance is as small as eps."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((64, 48), np.float32)
    norm = LayerNorm(48, dtype=jnp.float32)
    before = np.asarray(norm(jnp.asarray(x)))
    monkeypatch.setattr(layers, "LAYER_NORM_EPS", 1e-5)
    assert np.abs(np.asarray(norm(jnp.asarray(x))) - before).max() > 1000 * MODULE
