"""The mixture-of-experts block: route, dispatch, experts, combine, and the same over a mesh. Padding reaches no expert.

B batch, T length, S tokens (B*T), D hidden, E experts, F expert width, k experts per token, R = S*k rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.collectives import gather, gather_dim
from qvlmoe_jax.config import Qwen3VLMoeTextConfig
from qvlmoe_jax.dispatch import combine, count_choices, dispatch
from qvlmoe_jax.exchange import Exchange
from qvlmoe_jax.experts import KERNELS, ExpertStack
from qvlmoe_jax.experts_adapted import PRODUCTS, adapted_experts
from qvlmoe_jax.layers import Linear, einsum
from qvlmoe_jax.quantised import Held, QuantisedWeight, forgetful
from qvlmoe_jax.sharding import HIDDEN, active_mesh, axes_in, axes_of, fit, partition_spec
from qvlmoe_jax.trained_experts import TrainedStack
from qvlmoe_jax.turns import after, in_turn

EXPERTS = "layers/mlp/experts/"
"""Where the sharding table has them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """Sums over the valid tokens of the whole batch, one row per MoE layer once stacked (`[L,E]`, `[L]`).

    Attributes:
      tokens_per_expert: `[E]` how many (token, choice) pairs went to each expert; sums to k * num_tokens.
      prob_sum: `[E]` sum of the router's full softmax.
      log_z_squared: sum of logsumexp(router logits)^2.
      num_tokens: valid tokens seen.
    """

    tokens_per_expert: jax.Array
    prob_sum: jax.Array
    log_z_squared: jax.Array
    num_tokens: jax.Array


def route(logits_SE: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Top-k of the softmax, always renormalised (MOE 126-143; `norm_topk_prob` is ignored there too).

    Returns:
      probabilities `[S,E]` float32, weights `[S,k]` in the logits' dtype, experts `[S,k]` int32.
    """
    probs = jax.nn.softmax(logits_SE.astype(jnp.float32), axis=-1)
    top, experts = jax.lax.top_k(probs, k)
    weights = top / jnp.sum(top, axis=-1, keepdims=True)
    return probs, weights.astype(logits_SE.dtype), experts.astype(jnp.int32)


def route_with_bias(logits_SE: jax.Array, k: int, bias_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`route`, with a bias added to the probabilities for the choice alone, not to the weights (arXiv 2408.15664, equation 3)."""
    logits = logits_SE.astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    _, experts = jax.lax.top_k(probs + bias_E, k)
    # The same quotient as there, in a form that lasts when a bias chooses experts whose probabilities are all zero in float32.
    weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    return probs, weights.astype(logits_SE.dtype), experts.astype(jnp.int32)


def balanced_choice(num_tokens: int, num_experts: int, k: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Weights and experts of a perfectly even routing, for benchmarks: token s takes experts s*k .. s*k+k-1 in turn."""
    experts = (jnp.arange(num_tokens)[:, None] * k + jnp.arange(k)) % num_experts
    return jnp.full((num_tokens, k), 1 / k, dtype), experts.astype(jnp.int32)


class Qwen3VLMoeTextExperts(nnx.Module):
    """The experts' weights, `gate_up_proj [E,D,2,F]` and `down_proj [E,F,D]`, and their adapters if they have any."""

    gate_up_proj: nnx.Param | QuantisedWeight
    down_proj: nnx.Param | QuantisedWeight

    def __init__(self, config: Qwen3VLMoeTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        init = jax.nn.initializers.normal(config.initializer_range)
        self.gate_up_proj = nnx.Param(init(rngs.params(), (E, D, 2, F), dtype))
        self.down_proj = nnx.Param(init(rngs.params(), (E, F, D), dtype))
        self.lora_scale = 1.0

    def stack(self, layer: jax.Array) -> ExpertStack | None:
        """Layer `layer` of these, which are all layers' `[L,E,...]`; None of quantised ones, whose layer is expanded first, and
        of adapted ones, whose kernel reads no stack."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if isinstance(gate_up, QuantisedWeight) or isinstance(down, QuantisedWeight) or self.adapters():
            return None
        return ExpertStack(gate_up[...], down[...], layer)

    def adapters(self) -> dict[str, jax.Array]:
        """`gate_up_proj_lora_A [E,D,r]`, `gate_up_proj_lora_B [E,r,2,F]`, and `down_proj`'s; empty without adapters."""
        names = (f"{name}_lora_{factor}" for name in ("gate_up_proj", "down_proj") for factor in "AB")
        return {name: getattr(self, name)[...] for name in names if hasattr(self, name)}


class Qwen3VLMoeTextSparseMoeBlock(nnx.Module):
    """Router and experts of one layer: `(x [B,T,D], valid [B,T]) -> (y [B,T,D], RouterStats)`. `bias [E]`: see `route`.

    `stack`: the experts' weights once more, among those of all layers, to be read there if the kernel can.
    """

    def __init__(self, config: Qwen3VLMoeTextConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.k, self.num_experts, self.backend = config.num_experts_per_tok, config.num_experts, backend
        self.gate = Linear(
            "SD,DE->SE",
            (config.hidden_size, config.num_experts),
            init=jax.nn.initializers.normal(config.initializer_range),
            dtype=dtype,
            rngs=rngs,
        )
        self.experts = Qwen3VLMoeTextExperts(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        valid_BT: jax.Array,
        stack: ExpertStack | TrainedStack | None = None,
        bias_E: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        placed = forgetful(lambda block, *inputs: block._placed(*inputs), self.experts.gate_up_proj)
        return placed(self, x_BTD, valid_BT, stack, bias_E)

    def _placed(
        self, x_BTD: jax.Array, valid_BT: jax.Array, stack: ExpertStack | TrainedStack | None, bias_E: jax.Array | None
    ) -> tuple[jax.Array, RouterStats]:
        gate, adapters, mesh = self.gate.weight[...], self.experts.adapters(), active_mesh()
        gate_up = Held.of(self.experts.gate_up_proj, EXPERTS + "gate_up_proj", mesh)
        down = Held.of(self.experts.down_proj, EXPERTS + "down_proj", mesh)
        if mesh is None:
            return self._device(x_BTD, valid_BT, gate, gate_up, down, adapters, stack, bias_E, layout=_Layout())
        tokens = fit(HIDDEN[:2], valid_BT.shape, mesh)
        valid_BT = after(valid_BT, x_BTD, HIDDEN[:2], HIDDEN)
        # The weights are taken as the table left them, so entering the region moves nothing.
        gate_spec = partition_spec("layers/mlp/gate/weight", gate.shape, mesh)
        gate_up_specs, down_specs = gate_up.specs(EXPERTS + "gate_up_proj", mesh), down.specs(EXPERTS + "down_proj", mesh)
        adapter_specs = {name: partition_spec(EXPERTS + name, a.shape, mesh) for name, a in adapters.items()}
        stack_specs = stack and ExpertStack._make((P(None, *gate_up_specs.parts[0]), P(None, *down_specs.parts[0]), P()))
        layout = _Layout(tokens, gate_spec, gate_up_specs.parts, down_specs.parts, adapter_specs)
        y, stats = jax.shard_map(
            functools.partial(self._device, layout=layout),
            in_specs=(P(*tokens, None), tokens, gate_spec, gate_up_specs, down_specs, adapter_specs, stack_specs, P()),
            out_specs=(P(*tokens, None), P()),
            check_vma=False,
        )(x_BTD, valid_BT, gate, gate_up, down, adapters, stack, bias_E)
        stats, y = in_turn(stats, y, (), HIDDEN)
        return y, stats

    def _choose(
        self, x_SD: jax.Array, valid_S: jax.Array, gate_DE: jax.Array, bias_E: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """Weights `[S,k]`, experts `[S,k]` (padding: nobody) and the sums over these tokens."""
        router_dtype = jnp.float32 if self.backend.router_dtype == "float32" else x_SD.dtype
        logits = einsum("SD,DE->SE", x_SD.astype(router_dtype), gate_DE.astype(router_dtype))
        chosen = route(logits, self.k) if bias_E is None else route_with_bias(logits, self.k, bias_E)
        probs, weights, experts = chosen
        if self.backend.fake_balanced_gate:
            weights, experts = balanced_choice(x_SD.shape[0], self.num_experts, self.k, weights.dtype)
        experts = jnp.where(valid_S[:, None], experts, self.num_experts)
        log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
        stats = RouterStats(
            tokens_per_expert=count_choices(experts, self.num_experts).astype(jnp.float32),
            prob_sum=jnp.sum(jnp.where(valid_S[:, None], probs, 0), axis=0),
            log_z_squared=jnp.sum(jnp.where(valid_S, jnp.square(log_z), 0)),
            num_tokens=jnp.sum(valid_S, dtype=jnp.float32),
        )
        return weights, experts, stats

    def _device(
        self,
        x_BTD: jax.Array,
        valid_BT: jax.Array,
        gate: jax.Array,
        held_gate_up: Held,
        held_down: Held,
        adapters: dict[str, jax.Array],
        stack: ExpertStack | TrainedStack | None,
        bias_E: jax.Array | None,
        *,
        layout: _Layout,
    ) -> tuple[jax.Array, RouterStats]:
        """What one device does with its tokens and its experts; with an empty layout, the whole block."""
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        with jax.named_scope("router"):
            weights, experts, stats = self._choose(x, valid_BT.reshape(-1), gather(gate, layout.gate), bias_E)
            if layout.token_axes:
                stats = jax.lax.psum(stats, layout.token_axes)
        with jax.named_scope("weights"):
            if layout.gathers_experts:
                stack = None  # gathering copies the layer anyway
            gate_up = held_gate_up.expand(*map(_gather_fsdp, held_gate_up.parts, layout.gate_up))
            down = held_down.expand(*map(_gather_fsdp, held_down.parts, layout.down))
            adapters = {name: _gather_fsdp(a, layout.adapters.get(name, P())) for name, a in adapters.items()}

        def kernel(rows: jax.Array, sizes: jax.Array) -> jax.Array:
            if isinstance(stack, TrainedStack):
                return stack.run(rows, sizes)
            if adapters:
                product = PRODUCTS[self.backend.experts]
                return adapted_experts(product, rows, gate_up, down, adapters, self.experts.lora_scale, sizes)
            return KERNELS[self.backend.experts](rows, gate_up, down, sizes, stack)

        if layout.gather_tokens and self.backend.dispatch == "all_to_all":
            y = self._exchanged(x, weights, experts, kernel)
            if layout.tensor:
                y = jax.lax.psum(y, "tensor")
            return y.reshape(x_BTD.shape), stats
        with jax.named_scope("dispatch"):
            if layout.gather_tokens:
                x, weights, experts = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, weights, experts))
            local = gate_up.shape[-4]
            if layout.experts:
                experts = experts - jax.lax.axis_index("expert") * local
                experts = jnp.where((experts >= 0) & (experts < local), experts, local)
            rows, order, group_sizes = dispatch(x, experts, local)
        with jax.named_scope("experts"):
            rows = kernel(rows, group_sizes)
        with jax.named_scope("combine"):
            y = combine(rows, order, weights)
            if layout.gather_tokens:
                y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
            elif layout.experts:
                y = jax.lax.psum(y, "expert")
            if layout.tensor:  # of this device's own tokens: before the scatter, forward and backward, it would be of all of them
                y = jax.lax.psum(y, "tensor")
        return y.reshape(x_BTD.shape), stats

    def _exchanged(
        self, x: jax.Array, weights: jax.Array, experts: jax.Array, kernel: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        """`[S,D]`: this device's tokens sent to their experts' devices (`exchange`), computed there, and sent back."""
        with jax.named_scope("dispatch"):
            rows, order, group_sizes = dispatch(x, experts, self.num_experts)
            exchange = Exchange.plan(group_sizes, rows.shape[0], self.k)
            arrived = exchange.to_experts(rows)
            # senders follow one another in the buffer: sort once more, so that each expert's rows do
            sorted_, reorder, local_sizes = dispatch(arrived, exchange.experts_of_rows()[:, None], exchange.counts.shape[1])
        with jax.named_scope("experts"):
            done = kernel(sorted_, local_sizes)
        with jax.named_scope("combine"):
            rows = exchange.back(done[reorder.rows], rows.shape[0])
            return combine(rows, order, weights)


def _gather_fsdp(array: jax.Array, spec: P) -> jax.Array:
    """`array` with its fsdp axis gathered (an expert's axis stays split); inside `shard_map`."""
    for dim, entry in enumerate(spec, array.ndim - len(spec)):
        if "fsdp" in axes_of(entry):
            # gate_up as [E,D,2F], the shape of the product: in [E,D,2,F] the TPU compiler pads the gradient and shifts its rows
            flat = array.reshape(*array.shape[: dim + 1], -1) if array.ndim > dim + 2 else array
            array = gather_dim(flat, dim, "fsdp").reshape(*array.shape[:dim], -1, *array.shape[dim + 1 :])
    return array


@dataclass(frozen=True)
class _Layout:
    """Which mesh axes split what inside the block: the fitted specs of tokens and weights. Without a mesh, nothing does."""

    tokens: P = P(None, None)  # noqa: RUF009 (immutable)
    gate: P = P(None, None)  # noqa: RUF009 (immutable)
    gate_up: tuple[P, ...] = (P(None, None, None, None),)
    down: tuple[P, ...] = (P(None, None, None),)
    adapters: Mapping[str, P] = field(default_factory=dict)

    @property
    def token_axes(self) -> tuple[str, ...]:
        return tuple(axes_in(*self.tokens))

    @property
    def experts(self) -> bool:
        return any("expert" in axes_of(spec[-4]) for spec in self.gate_up)

    @property
    def tensor(self) -> bool:
        return any("tensor" in axes_of(spec[-1]) for spec in self.gate_up)

    @property
    def gathers_experts(self) -> bool:
        return any("fsdp" in axes_in(*spec) for spec in (*self.gate_up, *self.down))

    @property
    def gather_tokens(self) -> bool:
        """Tokens and experts are both spread over `expert`: every expert needs to see every token of the axis."""
        return self.experts and "expert" in self.token_axes
