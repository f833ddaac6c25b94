"""The text decoder: grouped attention with qk-norm and M-RoPE, MoE or dense layers, DeepStack after the first K of them.

B batch, T length, D hidden, N query heads, K kv heads, H head dim, F MLP width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qvlmoe_jax.attention import attention
from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.config import LayerKind, Qwen3VLMoeTextConfig
from qvlmoe_jax.experts import ExpertStack
from qvlmoe_jax.layer_plan import Run, Slot, plan_layers, slots
from qvlmoe_jax.layers import Embed, Linear, RMSNorm, stack, swiglu, truncated_normal
from qvlmoe_jax.moe import Qwen3VLMoeTextSparseMoeBlock, RouterStats
from qvlmoe_jax.remat import rematerialised
from qvlmoe_jax.rope import rotate, text_rotary
from qvlmoe_jax.sharding import BATCH, HIDDEN, active_mesh, constrain
from qvlmoe_jax.trained_experts import Passed, TrainedStack, passed_on
from qvlmoe_jax.turns import weights_in_turn


class Qwen3VLMoeTextAttention(nnx.Module):
    """Causal attention; q and k are normed per head BEFORE the rotation (MOE 219-297)."""

    def __init__(self, config: Qwen3VLMoeTextConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        init = truncated_normal(config.initializer_range, 2.0)
        self.backend = backend
        self.q_proj = Linear(
            "BTD,DNH->BTNH", (D, N, H), init=init, dtype=dtype, rngs=rngs, place="layers/self_attn/q_proj/weight"
        )
        self.k_proj = Linear(
            "BTD,DKH->BTKH", (D, K, H), init=init, dtype=dtype, rngs=rngs, place="layers/self_attn/k_proj/weight"
        )
        self.v_proj = Linear(
            "BTD,DKH->BTKH", (D, K, H), init=init, dtype=dtype, rngs=rngs, place="layers/self_attn/v_proj/weight"
        )
        self.o_proj = Linear(
            "BTNH,NHD->BTD", (N, H, D), init=init, dtype=dtype, rngs=rngs, place="layers/self_attn/o_proj/weight"
        )
        self.q_norm = RMSNorm(H, eps=config.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(H, eps=config.rms_norm_eps, dtype=dtype)

    def heads(self, x_BTD: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated q `[B,T,N,H]`, rotated k and v `[B,T,K,H]`."""
        q = rotate(self.q_norm(self.q_proj(x_BTD)), *rotary)
        k = rotate(self.k_norm(self.k_proj(x_BTD)), *rotary)
        v = self.v_proj(x_BTD)
        # Under context parallelism queries stay where they are; the kernel gathers keys and values.
        q, k, v = (constrain(a, BATCH, "context", "tensor", None) for a in (q, k, v))
        return q, k, v

    def __call__(self, x_BTD: jax.Array, rotary: tuple[jax.Array, jax.Array], segment_ids: jax.Array) -> jax.Array:
        q, k, v = self.heads(x_BTD, rotary)
        return self.o_proj(attention(q, k, v, segment_ids=segment_ids, causal=True, backend=self.backend))


class Qwen3VLMoeTextMLP(nnx.Module):
    """Dense SwiGLU of width `intermediate_size`, for layers without experts."""

    def __init__(self, config: Qwen3VLMoeTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        init = truncated_normal(config.initializer_range, 2.0)
        self.gate_proj = Linear("BTD,DF->BTF", (D, F), init=init, dtype=dtype, rngs=rngs, place="layers/mlp/gate_proj/weight")
        self.up_proj = Linear("BTD,DF->BTF", (D, F), init=init, dtype=dtype, rngs=rngs, place="layers/mlp/up_proj/weight")
        self.down_proj = Linear("BTF,FD->BTD", (F, D), init=init, dtype=dtype, rngs=rngs, place="layers/mlp/down_proj/weight")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Qwen3VLMoeTextDecoderLayer(nnx.Module):
    """`x [B,T,D]` plus attention, plus MLP; `(x, RouterStats | None)` out (None for a dense layer)."""

    def __init__(
        self, config: Qwen3VLMoeTextConfig, kind: LayerKind, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Qwen3VLMoeTextAttention(config, backend=backend, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = (
            Qwen3VLMoeTextSparseMoeBlock(config, backend=backend, dtype=dtype, rngs=rngs)
            if kind == "moe"
            else Qwen3VLMoeTextMLP(config, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array,
        stack: ExpertStack | TrainedStack | None = None,
        router_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        x = x + self.self_attn(self.input_layernorm(x), rotary, segment_ids)
        return self.feed_forward(x, segment_ids > 0, stack, router_bias)

    def feed_forward(
        self,
        x: jax.Array,
        valid: jax.Array,
        stack: ExpertStack | TrainedStack | None = None,
        router_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """The layer's second half. `stack` and `router_bias [E]`: see `Qwen3VLMoeTextSparseMoeBlock`."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Qwen3VLMoeTextSparseMoeBlock):
            y, stats = self.mlp(normed, valid, stack, router_bias)
        else:
            y, stats = self.mlp(normed), None
        return constrain(x + y, *HIDDEN), stats


class TextOutput(NamedTuple):
    """What the decoder returns.

    Attributes:
      last_hidden_state: `[B,T,D]`, normed.
      router_stats: sums per MoE layer (`[L_moe,...]`); None without experts.
      hidden_states: `[L+1,B,T,D]` as HF reports them (the embeddings, each layer's output before its DeepStack addition,
        the last one normed); None unless asked for.
    """

    last_hidden_state: jax.Array
    router_stats: RouterStats | None
    hidden_states: jax.Array | None


def broadcast_positions(position_ids: jax.Array | None, batch: int, length: int) -> jax.Array:
    """Positions as `[3,B,T]` from any rank HF takes: None (arange), `[B,T]`, `[3,B,T]`, or `[4,B,T]` less its text row."""
    if position_ids is None:
        position_ids = jnp.arange(length, dtype=jnp.int32)[None]
    if position_ids.ndim == 2:
        position_ids = position_ids[None]
    if position_ids.shape[0] == 4:
        position_ids = position_ids[1:]
    return jnp.broadcast_to(position_ids, (3, batch, length))


class Qwen3VLMoeTextModel(nnx.Module):
    """Embeddings, the stacked layers, the final norm.

    Attributes:
      layers: one stacked `Qwen3VLMoeTextDecoderLayer` when all layers share a body, else an `nnx.Dict` of them keyed by
        the first layer each holds (see `layer_plan`).
    """

    def __init__(self, config: Qwen3VLMoeTextConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config, self.backend = config, backend
        self.embed_tokens = Embed(
            (config.vocab_size, config.hidden_size), init=jax.nn.initializers.normal(1.0), dtype=dtype, rngs=rngs
        )
        made = {
            slot.name: stack(
                lambda keys, kind=slot.kind: Qwen3VLMoeTextDecoderLayer(config, kind, backend=backend, dtype=dtype, rngs=keys),
                slot.repeats,
                rngs,
            )
            for slot in slots(config)
        }
        self.layers = made[""] if "" in made else nnx.Dict(made)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deepstack: jax.Array | None = None,
        output_hidden_states: bool = False,
        router_bias: jax.Array | None = None,
    ) -> TextOutput:
        """
        Args:
          input_ids `[B,T]` or inputs_embeds `[B,T,D]`: exactly one of them.
          position_ids: any rank `broadcast_positions` takes. segment_ids: `[B,T]`, 0 = padding; None = one document.
          deepstack: `[K,B,T,D]`, zero at text columns; level k is added after layer k.
          router_bias: `[L_moe,E]`, added to each MoE layer's probabilities when it chooses experts (`moe.route`).
        Raises:
          ValueError: both or neither of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = inputs_embeds if input_ids is None else self.embed_tokens(input_ids)
        x = constrain(jnp.asarray(x), *HIDDEN)
        B, T, _ = x.shape
        if segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        rotary = self.rotary(broadcast_positions(position_ids, B, T), x.dtype)
        if deepstack is None:
            deepstack = jnp.zeros((0, *x.shape), x.dtype)
        before, collected, done = x[None], [], 0
        for run in plan_layers(self.config.layer_kinds()):
            width = sum(slot.kind == "moe" for slot in run.slots)
            bias = None
            if router_bias is not None:
                bias = router_bias[done : done + run.repeats * width].reshape(run.repeats, width, router_bias.shape[-1])
            x, outputs = self._scan(run, x, rotary, segment_ids, deepstack, output_hidden_states, bias)
            done += run.repeats * width
            collected.append(outputs)
        x, norm = weights_in_turn(x, self.norm, "language_model/norm", HIDDEN)
        x = norm(x)
        layer_outputs, stats = zip(*collected, strict=True)
        hidden = jnp.concatenate([before, *layer_outputs])[:-1] if output_hidden_states else None
        return TextOutput(x, _concatenate(stats), None if hidden is None else jnp.concatenate([hidden, x[None]]))

    def rotary(self, position_ids: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """cos and sin `[B,T,H]` for positions `[3,B,T]`."""
        config = self.config
        with jax.named_scope("rotary"):
            return text_rotary(
                position_ids,
                head_dim=config.head_dim,
                theta=config.rope_theta,
                mrope_section=config.mrope_section,
                dtype=dtype,
            )

    def slot_layers(self, slot: Slot) -> Qwen3VLMoeTextDecoderLayer:
        """The stacked layers of a slot."""
        return getattr(self.layers, slot.name) if slot.name else self.layers  # pyright: ignore[reportReturnType]

    def expert_stack(self, slot: Slot, index: jax.Array) -> ExpertStack | None:
        """The experts of layer `index` of a slot, where they lie (`Qwen3VLMoeTextExperts.stack`); None of dense layers."""
        mlp = self.slot_layers(slot).mlp
        return mlp.experts.stack(index) if isinstance(mlp, Qwen3VLMoeTextSparseMoeBlock) else None

    def _scan(
        self,
        run: Run,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array,
        deepstack: jax.Array,
        output_hidden_states: bool,
        router_bias: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array | None, RouterStats | None]]:
        """Runs the run's layers in order. Returns x, then hidden states and router sums with the layer as leading dim.

        `router_bias`: `[repeats,MoE layers of a period,E]`.
        """
        levels = deepstack.shape[0]
        # The kernel of tiles reads a stack, which to it is a constant, and gives the gradients to what is passed on, if anything
        # is, else to the layer's own weights, which are scanned over.
        use_stacks = self.backend.experts == "tiles" and active_mesh() is None
        stacks = [self.expert_stack(slot, jnp.int32(0)) if use_stacks else None for slot in run.slots]
        passed = [passed_on(stack) for stack in stacks]
        layers = [self.slot_layers(slot) for slot in run.slots]
        layers = [layer if own is None else _with_constant_experts(layer) for layer, own in zip(layers, passed, strict=True)]

        def body(
            carry: tuple[jax.Array, list[Passed | None]],
            step: tuple[jax.Array, list[Qwen3VLMoeTextDecoderLayer], jax.Array | None],
        ) -> tuple[tuple[jax.Array, list[Passed | None]], Any]:
            x, passed = carry
            index, layers, biases = step
            rows = iter(() if biases is None else biases)
            hidden, stats, handed_on = [], [], []
            for slot, layer, all_experts, own in zip(run.slots, layers, stacks, passed, strict=True):
                x, layer = weights_in_turn(x, layer, "layers", HIDDEN)
                read = all_experts and jax.lax.stop_gradient(all_experts._replace(layer=index))
                experts = read if read is None or own is None else TrainedStack(read, own)
                x, layer_stats = layer(x, rotary, segment_ids, experts, next(rows, None) if slot.kind == "moe" else None)
                handed_on.append(experts.passed if isinstance(experts, TrainedStack) else None)
                hidden.append(x)
                stats.append(layer_stats)
                if slot.first < levels:
                    number = slot.first + index * slot.period
                    x = x + jnp.where(number < levels, deepstack[jnp.minimum(number, levels - 1)], 0)
            stats = [jax.tree.map(lambda a: a[None], s) for s in stats if s is not None]
            return (x, handed_on), (jnp.stack(hidden) if output_hidden_states else None, _concatenate(stats))

        steps = jnp.arange(run.repeats), layers, router_bias
        (x, _), outputs = jax.lax.scan(rematerialised(body, self.backend), (x, passed), steps)
        # [repeats, period, ...] -> [layers, ...]
        return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def _with_constant_experts(layers: Qwen3VLMoeTextDecoderLayer) -> Qwen3VLMoeTextDecoderLayer:
    """The layers, without gradients of their experts' weights."""
    graph, experts, rest = nnx.split(layers, nnx.PathContains("experts"), ...)
    return nnx.merge(graph, jax.lax.stop_gradient(experts), rest)


def _concatenate(stats: Sequence[RouterStats | None]) -> RouterStats | None:
    """Joins router sums along the layer dim, leaving out what has none."""
    present = [s for s in stats if s is not None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *present) if present else None
