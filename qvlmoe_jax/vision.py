"""The vision tower: patches in, one merged visual token per 2x2 block out, and the DeepStack features taken on the way.

R vision rows, P patches per row, W numbers per patch, D vision width, N heads, H head dim, F MLP width, U patches per merged
token, M = R*P/U merged tokens, K DeepStack taps. Patches arrive merge-block-major, so a merged token is U neighbours.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qvlmoe_jax.attention import attention
from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.config import Qwen3VLMoeVisionConfig
from qvlmoe_jax.layers import Embed, LayerNorm, Linear, gelu, stack
from qvlmoe_jax.pieces import in_pieces
from qvlmoe_jax.remat import rematerialised
from qvlmoe_jax.rope import rotate, vision_rotary
from qvlmoe_jax.sharding import PICTURES
from qvlmoe_jax.turns import in_turn, weights_in_turn

PATCHES = (PICTURES, None, None)
"""How patches or visual tokens `[...,R,P,D]` lie on a mesh."""


class Qwen3VLMoeVisionAttention(nnx.Module):
    """Bidirectional attention within each frame; fused qkv with bias; rotation in float32 (MOE 488-562)."""

    def __init__(self, config: Qwen3VLMoeVisionConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        D, N, H = config.hidden_size, config.num_heads, config.head_dim
        init = jax.nn.initializers.normal(config.initializer_range)
        self.backend = backend
        self.qkv = Linear(
            "RPD,DCNH->RPCNH", (D, 3, N, H), init=init, dtype=dtype, rngs=rngs, use_bias=True, place="blocks/attn/qkv/weight"
        )
        self.proj = Linear(
            "RPNH,NHD->RPD", (N, H, D), init=init, dtype=dtype, rngs=rngs, use_bias=True, place="blocks/attn/proj/weight"
        )

    def __call__(self, x_RPD: jax.Array, rotary: tuple[jax.Array, jax.Array], segment_ids: jax.Array) -> jax.Array:
        q, k, v = jnp.unstack(self.qkv(x_RPD), axis=2)
        q, k = (rotate(a.astype(jnp.float32), *rotary).astype(v.dtype) for a in (q, k))
        return self.proj(attention(q, k, v, segment_ids=segment_ids, causal=False, backend=self.backend))


class Qwen3VLMoeVisionMLP(nnx.Module):
    """fc1, tanh GELU, fc2 (the mergers use the exact GELU instead)."""

    def __init__(self, config: Qwen3VLMoeVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        init = jax.nn.initializers.normal(config.initializer_range)
        self.width = F
        self.linear_fc1 = Linear(
            "RPD,DF->RPF", (D, F), init=init, dtype=dtype, rngs=rngs, use_bias=True, place="blocks/mlp/linear_fc1/weight"
        )
        self.linear_fc2 = Linear(
            "RPF,FD->RPD", (F, D), init=init, dtype=dtype, rngs=rngs, use_bias=True, place="blocks/mlp/linear_fc2/weight"
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        def of_rows(x: jax.Array) -> jax.Array:
            return self.linear_fc2(gelu(self.linear_fc1(x), approximate=True))

        return in_pieces(of_rows, x, width=self.width)


class Qwen3VLMoeVisionBlock(nnx.Module):
    """Pre-norm block: `x [R,P,D]` plus attention, plus MLP."""

    def __init__(self, config: Qwen3VLMoeVisionConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, dtype=dtype)
        self.norm2 = LayerNorm(config.hidden_size, dtype=dtype)
        self.attn = Qwen3VLMoeVisionAttention(config, backend=backend, dtype=dtype, rngs=rngs)
        self.mlp = Qwen3VLMoeVisionMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], segment_ids: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x), rotary, segment_ids)
        return x + self.mlp(self.norm2(x))


class Qwen3VLMoeVisionPatchMerger(nnx.Module):
    """U neighbouring patches -> one token of the text's width: `[..., P, D] -> [..., P/U, out]` (MOE 644-660).

    The main merger norms each patch and then joins; DeepStack mergers (`use_postshuffle_norm`) join and then norm over U*D.
    """

    def __init__(self, config: Qwen3VLMoeVisionConfig, *, use_postshuffle_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size * config.merge_unit
        init = jax.nn.initializers.normal(config.initializer_range)
        self.use_postshuffle_norm, self.merge_unit = use_postshuffle_norm, config.merge_unit
        self.norm = LayerNorm(width if use_postshuffle_norm else config.hidden_size, dtype=dtype)
        self.linear_fc1 = Linear(
            "...D,DF->...F", (width, width), init=init, dtype=dtype, rngs=rngs, use_bias=True, place="merger/linear_fc1/weight"
        )
        out = (width, config.out_hidden_size)
        self.linear_fc2 = Linear(
            "...F,FD->...D", out, init=init, dtype=dtype, rngs=rngs, use_bias=True, place="merger/linear_fc2/weight"
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.use_postshuffle_norm:
            x = self.norm(x)
        x = x.reshape(*x.shape[:-2], x.shape[-2] // self.merge_unit, -1)
        if self.use_postshuffle_norm:
            x = self.norm(x)
        return self.linear_fc2(gelu(self.linear_fc1(x), approximate=False))


class Qwen3VLMoeVisionPatchEmbed(nnx.Module):
    """A convolution whose kernel is its stride is one product per flattened patch: `[R,P,W] -> [R,P,D]`."""

    def __init__(self, config: Qwen3VLMoeVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = Linear(
            "RPW,WD->RPD",
            (config.patch_width, config.hidden_size),
            init=jax.nn.initializers.normal(config.initializer_range),
            dtype=dtype,
            rngs=rngs,
            use_bias=True,
            place="patch_embed/proj/weight",
        )

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        return self.proj(pixel_values.astype(self.proj.weight.dtype))


class Qwen3VLMoeVisionModel(nnx.Module):
    """The whole tower.

    Attributes:
      blocks: ONE block whose parameters are stacked over depth.
      deepstack_merger_list: ONE merger stacked over `deepstack_visual_indexes`, in that list's order; None without taps.
    """

    def __init__(self, config: Qwen3VLMoeVisionConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config, self.backend = config, backend
        init = jax.nn.initializers.normal(config.initializer_range)
        self.patch_embed = Qwen3VLMoeVisionPatchEmbed(config, dtype=dtype, rngs=rngs)
        self.pos_embed = Embed(
            (config.num_position_embeddings, config.hidden_size), init=init, dtype=dtype, rngs=rngs, place="pos_embed/weight"
        )
        self.blocks = stack(
            lambda keys: Qwen3VLMoeVisionBlock(config, backend=backend, dtype=dtype, rngs=keys), config.depth, rngs
        )
        self.merger = Qwen3VLMoeVisionPatchMerger(config, use_postshuffle_norm=False, dtype=dtype, rngs=rngs)
        taps = len(config.deepstack_visual_indexes)
        self.deepstack_merger_list = (
            stack(lambda keys: Qwen3VLMoeVisionPatchMerger(config, use_postshuffle_norm=True, dtype=dtype, rngs=keys), taps, rngs)
            if taps
            else None
        )

    def embed(self, pixel_values: jax.Array, pos_index: jax.Array, pos_weight: jax.Array) -> jax.Array:
        """Patch embeddings plus the learned table, interpolated by 4 taps: weights and sum in float32, then one cast."""
        x = self.patch_embed(pixel_values)
        # Tap by tap: as one sum over an axis of four, XLA:CPU takes a hundred times as long, longer than the patches' product.
        taps = (self.pos_embed(pos_index[..., i]).astype(jnp.float32) * pos_weight[..., i, None] for i in range(4))
        positions = functools.reduce(jnp.add, taps)
        return x + positions.astype(x.dtype)

    def __call__(
        self, pixel_values: jax.Array, segment_ids: jax.Array, coords: jax.Array, pos_index: jax.Array, pos_weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """
        Args:
          pixel_values: `[R,P,W]`; segment_ids: `[R,P]`, one per frame, 0 = padding; coords: `[R,P,2]`;
          pos_index, pos_weight: `[R,P,4]`. All as `Batch` holds them, for one group.
        Returns:
          visual tokens `[R,P/U,out]` and DeepStack features `[K,R,P/U,out]`, in BLOCK order whatever the list's order.
        """
        x = self.embed(pixel_values, pos_index, pos_weight)
        rotary = vision_rotary(coords, head_dim=self.config.head_dim, theta=self.config.rope_theta)
        taps = sorted(self.config.deepstack_visual_indexes)

        def through(x: jax.Array, block: Qwen3VLMoeVisionBlock) -> jax.Array:
            x, block = weights_in_turn(x, block, "blocks", PATCHES)
            return block(x, rotary, segment_ids)

        def merge(_: None, tap: tuple[Qwen3VLMoeVisionPatchMerger, jax.Array]) -> tuple[None, jax.Array]:
            x, merger = weights_in_turn(tap[1], tap[0], "deepstack_merger_list", PATCHES)
            return None, merger(x)

        run = rematerialised(through, self.backend)

        # ONE scan, so one body to compile. Every block writes its output over its predecessor's, in the slot of the next tap: a
        # tap's output is the last in its slot. (Collecting every block's output to pick K would cost depth/K times the memory.)
        def body(state: tuple[jax.Array, jax.Array], step: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, tapped = state
            slot, block = step
            x = run(x, block)
            return (x, jax.lax.dynamic_update_index_in_dim(tapped, x, slot, 0)), None

        slots = np.searchsorted(taps, np.arange(self.config.depth)).astype(np.int32)
        tapped = jnp.zeros((len(taps) + 1, *x.shape), x.dtype)
        (x, tapped), _ = jax.lax.scan(body, (x, tapped), (slots, self.blocks))
        x, merger = weights_in_turn(x, self.merger, "merger", PATCHES)
        tokens = merger(x)
        if not taps or self.deepstack_merger_list is None:
            return tokens, jnp.zeros((0, *tokens.shape), tokens.dtype)
        order = np.argsort(self.config.deepstack_visual_indexes)
        mergers = self.deepstack_merger_list
        if (np.diff(order) < 0).any():  # the list names its taps out of order; merger i belongs to the list's entry i
            mergers = jax.tree.map(lambda p: p[order], mergers)
        tokens, tapped = in_turn(tokens, tapped, PATCHES, PATCHES)
        _, deepstack = jax.lax.scan(merge, None, (mergers, tapped[:-1]))
        return tokens, deepstack
