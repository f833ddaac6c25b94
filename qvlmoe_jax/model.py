"""The whole model: vision tower, fusion of visual tokens into the text, decoder, head.

B batch, T length, D hidden, V vocab, G vision groups, R rows, P patches, M merged visual tokens of a group, K DeepStack levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.batch import Batch
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import BatchError, ConfigError
from qvlmoe_jax.generation_config import GenerationConfig
from qvlmoe_jax.hub import find_source
from qvlmoe_jax.layers import Embed, Linear, einsum, truncated_normal
from qvlmoe_jax.moe import RouterStats
from qvlmoe_jax.sharding import BATCH, HIDDEN, PICTURES, constrain, tree_shardings
from qvlmoe_jax.text import Qwen3VLMoeTextModel, TextOutput
from qvlmoe_jax.turns import weights_in_turn
from qvlmoe_jax.vision import Qwen3VLMoeVisionModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    Attributes:
      logits: `[B,T,V]` in the model's dtype, or `[B,n,V]` with logits_to_keep.
      aux_loss: HF's load-balancing loss, not yet scaled by `router_aux_loss_coef`; None unless asked for.
      router_stats: sums over valid tokens per MoE layer (`[L_moe,E]`); None for a dense model.
      hidden_states: `[L+1,B,T,D]` as HF reports them; None unless asked for.
    """

    logits: jax.Array
    aux_loss: jax.Array | None = None
    router_stats: RouterStats | None = None
    hidden_states: jax.Array | None = None


def load_balancing_loss(stats: RouterStats, whole: RouterStats | None = None) -> jax.Array:
    """`E * sum_e f_e p_e`, with f and p pooled over all MoE layers and valid tokens (MOE 1338-1408). Perfect balance gives k.

    Args:
      whole: the sums of all shards where `stats` are one shard's. The loss is linear in p, so the shards' values add up to it.
    """
    whole = stats if whole is None else whole
    rows = jnp.maximum(jnp.sum(whole.num_tokens), 1)
    fraction = jnp.sum(whole.tokens_per_expert, axis=0) / rows
    probability = jnp.sum(stats.prob_sum, axis=0) / rows
    return fraction.shape[0] * jnp.sum(fraction * probability)


def gather_visual(features: jax.Array, visual_index: jax.Array) -> jax.Array:
    """Visual tokens of `features [G,M,D]` at the columns that hold them, `[B,T,D]`, zero at text columns.

    Each group serves its own B/G rows, so with G sharded like B the gather and its transpose stay on their device.
    """
    G = features.shape[0]
    B, T = visual_index.shape
    index = visual_index.reshape(G, B // G * T)
    picked = jax.vmap(lambda tokens, i: jnp.take(tokens, jnp.maximum(i, 0), axis=0, mode="clip"))(features, index)
    return jnp.where(index[..., None] >= 0, picked, 0).reshape(B, T, -1)


class Qwen3VLMoeModel(nnx.Module):
    """Vision tower (`visual`) and text decoder (`language_model`) without the head."""

    def __init__(self, config: Qwen3VLMoeConfig, *, backend: BackendConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.visual = Qwen3VLMoeVisionModel(config.vision_config, backend=backend, dtype=dtype, rngs=rngs)
        self.language_model = Qwen3VLMoeTextModel(config.text_config, backend=backend, dtype=dtype, rngs=rngs)

    @jax.named_scope("visual")
    def visual_features(self, batch: Batch) -> tuple[jax.Array, jax.Array] | None:
        """Visual tokens `[G,M,D]` and DeepStack features `[K,G,M,D]`; None when the batch has no room for pictures.

        An all-padding input skips the tower (one `lax.cond`).
        """
        if not batch.patch_segment_ids.size:
            return None
        vision = self.config.vision_config
        G, R, P = batch.patch_segment_ids.shape
        K, M = len(vision.deepstack_visual_indexes), R * P // vision.merge_unit
        dtype = self.language_model.embed_tokens.weight.dtype

        def rows(a: Any) -> jax.Array:
            return constrain(jnp.asarray(a).reshape(G * R, *a.shape[2:]), PICTURES, *([None] * (a.ndim - 2)))

        inputs = [batch.pixel_values, batch.patch_segment_ids, batch.patch_coords, batch.pos_index, batch.pos_weight]
        D = vision.out_hidden_size

        def tower() -> tuple[jax.Array, jax.Array]:
            tokens, deepstack = self.visual(*map(rows, inputs))
            return tokens.reshape(G, M, D).astype(dtype), deepstack.reshape(K, G, M, D).astype(dtype)

        def nothing() -> tuple[jax.Array, jax.Array]:
            return jnp.zeros((G, M, D), dtype), jnp.zeros((K, G, M, D), dtype)

        tokens, deepstack = jax.lax.cond(jnp.any(batch.patch_segment_ids > 0), tower, nothing)
        return constrain(tokens, BATCH, None, None), constrain(deepstack, None, BATCH, None, None)

    def embed(
        self,
        input_ids: jax.Array,
        visual_index: jax.Array,
        visual: tuple[jax.Array, jax.Array] | None,
        inputs_embeds: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Embeddings `[B,T,D]` with visual tokens at their columns, and DeepStack features `[K,B,T,D]` (None without).

        Args:
          input_ids, visual_index: `[B,T]`, any run of a batch's columns.
          visual: what `visual_features` returned; None = no pictures.
        """
        table = self.language_model.embed_tokens
        if visual is not None:
            tokens, table = weights_in_turn(visual[0], table, "embed_tokens", (BATCH, None, None))
            visual = tokens, visual[1]
        with jax.named_scope("embed"):
            x = table(input_ids) if inputs_embeds is None else inputs_embeds
        if visual is None:
            return x, None
        with jax.named_scope("fusion"):
            tokens, features = visual
            x = jnp.where((visual_index >= 0)[..., None], gather_visual(tokens, visual_index), x)
            if not features.shape[0]:
                return x, None
            return x, jax.vmap(gather_visual, in_axes=(0, None))(features, visual_index)

    def __call__(
        self,
        batch: Batch,
        *,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
        router_bias: jax.Array | None = None,
    ) -> TextOutput:
        """Embeds, puts visual tokens at their columns, runs the decoder with DeepStack.

        `inputs_embeds [B,T,D]` replaces the lookup; visual tokens are still put in. `router_bias`: see `Qwen3VLMoeTextModel`.
        """
        batch = jax.tree.map(jnp.asarray, batch)
        x, deepstack = self.embed(batch.input_ids, batch.visual_index, self.visual_features(batch), inputs_embeds)
        return self.language_model(
            inputs_embeds=x,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
            deepstack=deepstack,
            output_hidden_states=output_hidden_states,
            router_bias=router_bias,
        )


def keep_columns(hidden: jax.Array, segment_ids: jax.Array, logits_to_keep: Any) -> jax.Array:
    """HF's `logits_to_keep` on `[B,T,D]`: 0 = all, n = the last n columns, an array = those columns.

    "Last" counts from the batch's last column that holds a token, not from the bucket's end, which is padding HF never sees. For
    an n beyond the first column, that one is repeated, since no shape can depend on tokens; there are at most T.

    Raises:
      BatchError: a negative number, or columns that the batch does not have.
    """
    T = hidden.shape[1]
    if isinstance(logits_to_keep, Integral):
        if logits_to_keep < 0:
            raise BatchError(f"logits_to_keep = {logits_to_keep}, expected 0 (all columns) or how many of the last columns")
        if logits_to_keep == 0:
            return hidden
        logits_to_keep = min(int(logits_to_keep), T)
        end = jnp.max(jnp.where(jnp.any(segment_ids > 0, axis=0), jnp.arange(T) + 1, 0))
        logits_to_keep = jnp.maximum(end - logits_to_keep + jnp.arange(logits_to_keep), 0)
    elif not isinstance(logits_to_keep, Tracer):  # whose numbers cannot be known
        columns = np.asarray(logits_to_keep)
        if columns.dtype.kind not in "iu" or (columns.size and not 0 <= columns.min() <= columns.max() < T):
            raise BatchError(f"logits_to_keep = {logits_to_keep!r}, expected columns from 0 to {T - 1}")
    return jnp.take(hidden, jnp.asarray(logits_to_keep), axis=1)


def weight_dtype(dtype: DTypeLike) -> np.dtype:
    """A dtype to hold weights and compute in.

    Raises:
      ConfigError: it is no floating-point dtype of 16 bits or more: weights cast to int8 are all but 0.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise ConfigError(f"dtype = {dtype!r}, expected float32, bfloat16 or float16")
    return found


class Qwen3VLMoeForConditionalGeneration(nnx.Module):
    """The model with its head; a pytree, so `jax.jit(lambda model, batch: model(batch))` works.

    Attributes:
      model: `Qwen3VLMoeModel`.
      lm_head: `Linear [D,V]`, or None when tied to the embedding.
      generation_config: the checkpoint's stop tokens and sampling values; empty for a model made from a config.
    """

    def __init__(
        self,
        config: Qwen3VLMoeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        backend: BackendConfig | None = None,
    ):
        self.config, self.generation_config = config, GenerationConfig()
        self.backend = (backend or BackendConfig()).resolve(jax.default_backend())
        self.model = Qwen3VLMoeModel(config, backend=self.backend, dtype=dtype, rngs=rngs)
        D, V = config.text_config.hidden_size, config.text_config.vocab_size
        std = D**-0.5
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear("BTD,DV->BTV", (D, V), init=truncated_normal(std, 3 * std), dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        batch: Batch,
        *,
        inputs_embeds: jax.Array | None = None,
        logits_to_keep: int | Any = 0,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
    ) -> ModelOutput:
        """
        Args:
          batch: see `Batch`. inputs_embeds: `[B,T,D]` in place of the embedding lookup (visual tokens are still put in).
          logits_to_keep: 0 = every column, n = the last n, an integer array = those columns.
          output_router_logits: also compute `aux_loss`; None = the config's choice.
        """
        out = self.model(batch, inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states)
        with jax.named_scope("lm_head"):
            hidden = keep_columns(out.last_hidden_state, jnp.asarray(batch.segment_ids), logits_to_keep)
            logits = self.logits(hidden)
        if output_router_logits is None:
            output_router_logits = self.config.text_config.output_router_logits
        aux = load_balancing_loss(out.router_stats) if output_router_logits and out.router_stats is not None else None
        return ModelOutput(logits, aux, out.router_stats, out.hidden_states)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: `[B,T,D]` normed hidden states -> `[B,T,V]`."""
        if self.lm_head is None:
            hidden, table = weights_in_turn(hidden, self.model.language_model.embed_tokens, "embed_tokens", HIDDEN)
            logits = einsum("BTD,VD->BTV", hidden, table.weight[...])
        else:
            hidden, lm_head = weights_in_turn(hidden, self.lm_head, "lm_head", HIDDEN)
            logits = lm_head(hidden)
        return constrain(logits, BATCH, "context", "tensor")

    @classmethod
    def from_config(
        cls,
        config: Qwen3VLMoeConfig | Mapping[str, Any],
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        backend: BackendConfig | None = None,
    ) -> Qwen3VLMoeForConditionalGeneration:
        """A model with random weights (the seed system's distributions), made on the mesh's devices when there is one.

        Args:
          config: a `Qwen3VLMoeConfig` or a `config.json` object.
          dtype: of the parameters and so of the computation; None = float32.
        Raises:
          ConfigError: `config` is refused, or `dtype` is not a floating-point one.
        """
        if not isinstance(config, Qwen3VLMoeConfig):
            config = Qwen3VLMoeConfig.from_hf(config)
        own = weight_dtype(jnp.float32 if dtype is None else dtype)

        def make(key: jax.Array) -> Qwen3VLMoeForConditionalGeneration:
            return cls(config, rngs=nnx.Rngs(key), dtype=own, backend=backend)

        key = rngs.params()
        abstract = jax.eval_shape(make, key)
        shardings = None if mesh is None else tree_shardings(abstract.params(), mesh)
        return abstract.with_params(jax.jit(lambda key: make(key).params(), out_shardings=shardings)(key))

    @classmethod
    def abstract(
        cls, config: Qwen3VLMoeConfig, *, dtype: DTypeLike = jnp.float32, backend: BackendConfig | None = None
    ) -> Qwen3VLMoeForConditionalGeneration:
        """The model with `jax.ShapeDtypeStruct`s for parameters: shapes of any size, no memory."""
        return jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=dtype, backend=backend))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        backend: BackendConfig | None = None,
    ) -> Qwen3VLMoeForConditionalGeneration:
        """Opens a Hugging Face directory, a converted one, or a training run.

        Args:
          directory: its path, or a hub repository's `ORG/NAME`, downloaded first if it is not in the hub's cache.
          dtype: None = the checkpoint's own; of several, the one that config.json names.
          mesh: parameters arrive sharded by the one table; None = on the default device.
        Raises:
          ConfigError, CheckpointError: what is wrong with the directory, by file or key.
        """
        from qvlmoe_jax import checkpoint  # not needed to build a model

        dtype = None if dtype is None else weight_dtype(dtype)
        weights = checkpoint.open_weights(find_source(directory))
        model = cls.abstract(weights.config, backend=backend)
        model.generation_config = GenerationConfig.from_directory(weights.side_directory, weights.config.to_hf())
        dtype = checkpoint.own_dtype(weights) if dtype is None else dtype
        return model.with_params(checkpoint.load_params(weights, dtype=dtype, mesh=mesh))

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int = 5 * 10**9) -> None:
        """Writes config.json, generation_config.json and safetensors in the hub's layout, which `transformers` and vLLM read."""
        from qvlmoe_jax import checkpoint

        generation = self.generation_config.to_hf()
        checkpoint.save_hf(directory, self.config, self.params(), generation=generation, max_shard_size=max_shard_size)

    def params(self) -> dict[str, Any]:
        """The parameters as a pure dict of arrays whose keys follow the HF path (see docs/checkpoint.md)."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def with_params(self, params: Mapping[str, Any]) -> Qwen3VLMoeForConditionalGeneration:
        """The same model around other parameters (same tree; any dtype or sharding)."""
        graphdef, state = nnx.split(self)
        nnx.replace_by_pure_dict(state, dict(params))
        return nnx.merge(graphdef, state)

    def get_input_embeddings(self) -> Embed:
        """The token embedding."""
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, embeddings: Embed) -> None:
        """Replaces the token embedding; a tied head follows."""
        self.model.language_model.embed_tokens = embeddings

    def get_output_embeddings(self) -> Linear | None:
        """The head, or None when tied."""
        return self.lm_head

    def set_output_embeddings(self, head: Linear | None) -> None:
        """Replaces the head; None ties it to the embedding. The config says which, for whoever saves the model."""
        self.lm_head = nnx.data(head)  # a tied model made it as None, which nnx took for a static attribute
        self.config = self.model.config = dataclasses.replace(self.config, tie_word_embeddings=head is None)


ModelClass = Qwen3VLMoeForConditionalGeneration
