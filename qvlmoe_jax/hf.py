"""ONE table between Hugging Face's tensors and this package's parameters; both directions read the same rows.

A row says where a tensor lives in the parameter tree and how its numbers are arranged there: reshape, then permute axes. Both
are views in numpy, so a row applied to a memory-mapped file reads nothing. Linears are stored `[in..., out...]` (`x @ W`).

Legend: D hidden, N query heads, K kv heads, H head dim, E experts, F expert width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from qvlmoe_jax.config import LayerKind, Qwen3VLMoeConfig, Qwen3VLMoeTextConfig, Qwen3VLMoeVisionConfig
from qvlmoe_jax.layer_plan import slots

TABLE_VERSION = 1
"""Goes up whenever a parameter's path, shape or orientation changes: a converted directory records it."""

ExpertLayout = Literal["hub", "v5", "per_expert"]
"""How the experts are stored: fused and `[E,in,out]` (`hub`: hub files, 4.57), fused and `[E,out,in]` (`v5`: what 5.x saves), or
three linears `[out,in]` for each expert (`per_expert`: quantisers, some trainers)."""

LM_HEAD_KEY = "lm_head.weight"
EMBED_TOKENS_KEY = "model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Row:
    """One HF tensor: `param[path][index] == tensor.reshape(split).transpose(axes)`.

    Attributes:
      key: the tensor's name in the checkpoint.
      path: the parameter's place in the tree, '/'-joined.
      index: where the tensor sits in the parameter: numbers for the stacked axes (and the expert, and gate or up, where these are
        tensors of their own), whole slices between them; empty when it is the whole parameter.
      hf_shape: the tensor's shape on disk.
      split: the shape after the reshape.
      axes: the permutation after it.
    """

    key: str
    path: str
    index: tuple[int | slice, ...]
    hf_shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter's slice that this tensor fills."""
        return tuple(self.split[axis] for axis in self.axes)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """`hf_shape` -> `shape`; a view of a contiguous tensor."""
        return tensor.reshape(self.split).transpose(self.axes)

    def to_hf(self, param: np.ndarray) -> np.ndarray:
        """`shape` -> `hf_shape`, the inverse of `to_param`."""
        return param.transpose(np.argsort(self.axes)).reshape(self.hf_shape)

    def hf_rows(self, start: int, stop: int) -> tuple[int | slice, ...]:
        """Index into the parameter of the tensor's part `split[0]` in start..stop, which is one run of its bytes on disk."""
        inner = tuple(slice(start, stop) if axis == 0 else slice(None) for axis in self.axes)
        return part(self.index, inner)


def part(index: tuple[int | slice, ...], inner: tuple[int | slice, ...]) -> tuple[int | slice, ...]:
    """`param[part(index, inner)] == param[index][inner]` for an `index` of numbers and whole slices."""
    remaining = iter(inner)
    return (*(at if isinstance(at, int) else next(remaining) for at in index), *remaining)


class _Tensor(NamedTuple):
    """A row before it is placed: `name` is relative to the module that repeats.

    `param` and `at` tell an expert's linear, which is a part of a fused parameter, where it goes.
    """

    name: str
    hf_shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    param: str = ""
    at: tuple[int | slice, ...] = ()


def _same(name: str, *shape: int, split: tuple[int, ...] | None = None) -> _Tensor:
    """Stored as HF stores it, apart from a reshape."""
    split = split or shape
    return _Tensor(name, shape, split, tuple(range(len(split))))


def _linear(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], hf_shape: tuple[int, ...] | None = None) -> _Tensor:
    """torch's `[out, in]` to ours `[in..., out...]`."""
    split = outputs + inputs
    axes = tuple(range(len(outputs), len(split))) + tuple(range(len(outputs)))
    return _Tensor(name, hf_shape or (math.prod(outputs), math.prod(inputs)), split, axes)


def _norm(name: str, width: int) -> list[_Tensor]:
    return [_same(f"{name}.weight", width), _same(f"{name}.bias", width)]


def _biased(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[_Tensor]:
    return [_linear(f"{name}.weight", inputs, outputs), _same(f"{name}.bias", math.prod(outputs), split=outputs)]


def _experts(c: Qwen3VLMoeTextConfig, layout: ExpertLayout) -> list[_Tensor]:
    """Gate is the first F of the 2F columns, up the last F (MOE 74)."""
    E, D, F = c.num_experts, c.hidden_size, c.moe_intermediate_size
    gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    if layout == "per_expert":
        tensors = []
        for e in range(E):
            for i, name in enumerate(("gate_proj", "up_proj")):
                linear = _linear(f"mlp.experts.{e}.{name}.weight", (D,), (F,))
                tensors.append(linear._replace(param=gate_up, at=(e, slice(None), i)))
            linear = _linear(f"mlp.experts.{e}.down_proj.weight", (F,), (D,))
            tensors.append(linear._replace(param=down, at=(e,)))
        return tensors
    if layout == "hub":
        return [
            _same(gate_up, E, D, 2 * F, split=(E, D, 2, F)),
            _same(down, E, F, D),
        ]
    return [
        _Tensor(gate_up, (E, 2 * F, D), (E, 2, F, D), (0, 3, 1, 2)),
        _Tensor(down, (E, D, F), (E, D, F), (0, 2, 1)),
    ]


def _decoder_layer(c: Qwen3VLMoeTextConfig, kind: LayerKind, layout: ExpertLayout) -> list[_Tensor]:
    D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    tensors = [
        _same("input_layernorm.weight", D),
        _linear("self_attn.q_proj.weight", (D,), (N, H)),
        _linear("self_attn.k_proj.weight", (D,), (K, H)),
        _linear("self_attn.v_proj.weight", (D,), (K, H)),
        _linear("self_attn.o_proj.weight", (N, H), (D,)),
        _same("self_attn.q_norm.weight", H),
        _same("self_attn.k_norm.weight", H),
        _same("post_attention_layernorm.weight", D),
    ]
    if kind == "moe":
        return [*tensors, _linear("mlp.gate.weight", (D,), (c.num_experts,)), *_experts(c, layout)]
    return [
        *tensors,
        _linear("mlp.gate_proj.weight", (D,), (c.intermediate_size,)),
        _linear("mlp.up_proj.weight", (D,), (c.intermediate_size,)),
        _linear("mlp.down_proj.weight", (c.intermediate_size,), (D,)),
    ]


def _vision_block(c: Qwen3VLMoeVisionConfig) -> list[_Tensor]:
    D, N, H = c.hidden_size, c.num_heads, c.head_dim
    return [
        *_norm("norm1", D),
        *_biased("attn.qkv", (D,), (3, N, H)),
        *_biased("attn.proj", (N, H), (D,)),
        *_norm("norm2", D),
        *_biased("mlp.linear_fc1", (D,), (c.intermediate_size,)),
        *_biased("mlp.linear_fc2", (c.intermediate_size,), (D,)),
    ]


def _merger(c: Qwen3VLMoeVisionConfig, norm_width: int) -> list[_Tensor]:
    merged = c.merge_unit * c.hidden_size
    return [
        *_norm("norm", norm_width),
        *_biased("linear_fc1", (merged,), (merged,)),
        *_biased("linear_fc2", (merged,), (c.out_hidden_size,)),
    ]


def _patch_embed(c: Qwen3VLMoeVisionConfig) -> list[_Tensor]:
    """A convolution whose kernel is its stride is a linear on flattened patches (VU: flat order C, T, ph, pw)."""
    kernel = (c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    return [
        _linear("patch_embed.proj.weight", (c.patch_width,), (c.hidden_size,), hf_shape=kernel),
        _same("patch_embed.proj.bias", c.hidden_size),
    ]


def _place(tensors: Iterable[_Tensor], key: str, path: str, index: tuple[int, ...] = ()) -> list[Row]:
    return [
        Row(key + t.name, path + (t.param or t.name).replace(".", "/"), index + t.at, t.hf_shape, t.split, t.axes)
        for t in tensors
    ]


def layers_path(slot_name: str) -> str:
    """Place of a slot's stacked decoder layers in the parameter tree."""
    return "model/language_model/layers/" + (f"{slot_name}/" if slot_name else "")


@functools.lru_cache(maxsize=16)
def expand(config: Qwen3VLMoeConfig, layout: ExpertLayout = "hub") -> tuple[Row, ...]:
    """Every tensor of a checkpoint with this config, in network order, the experts oriented as `layout` says.

    Decoder layers are stacked by slot (`layer_plan.slots`), vision blocks in block order, DeepStack mergers in the order of
    `deepstack_visual_indexes`, which is the order of HF's module list. A tied model has no `lm_head.weight` row.
    """
    text, vision = config.text_config, config.vision_config
    rows = _place(_patch_embed(vision), "model.visual.", "model/visual/")
    rows += _place(
        [_same("pos_embed.weight", vision.num_position_embeddings, vision.hidden_size)], "model.visual.", "model/visual/"
    )
    for i in range(vision.depth):
        rows += _place(_vision_block(vision), f"model.visual.blocks.{i}.", "model/visual/blocks/", (i,))
    rows += _place(_merger(vision, vision.hidden_size), "model.visual.merger.", "model/visual/merger/")
    deepstack = "model.visual.deepstack_merger_list."
    for i in range(len(vision.deepstack_visual_indexes)):
        merger = _merger(vision, vision.merge_unit * vision.hidden_size)
        rows += _place(merger, f"{deepstack}{i}.", deepstack.replace(".", "/"), (i,))

    vocabulary = (text.vocab_size, text.hidden_size)
    rows += _place([_same("embed_tokens.weight", *vocabulary)], "model.language_model.", "model/language_model/")
    place = {layer: (slot, i) for slot in slots(text) for i, layer in enumerate(slot.layers)}
    for layer in range(text.num_hidden_layers):
        slot, i = place[layer]
        tensors = _decoder_layer(text, slot.kind, layout)
        rows += _place(tensors, f"model.language_model.layers.{layer}.", layers_path(slot.name), (i,))
    rows += _place([_same("norm.weight", text.hidden_size)], "model.language_model.", "model/language_model/")
    if not config.tie_word_embeddings:
        rows += _place([_linear(LM_HEAD_KEY, (text.hidden_size,), (text.vocab_size,))], "", "")
    return tuple(rows)


def rows_by_path(rows: Iterable[Row]) -> dict[str, tuple[Row, ...]]:
    """The rows that fill each parameter, in stacking order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.path, []).append(row)

    def order(row: Row) -> tuple[int, ...]:
        return tuple(at for at in row.index if isinstance(at, int))

    return {path: tuple(sorted(group, key=order)) for path, group in groups.items()}


def param_shapes(config: Qwen3VLMoeConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model."""

    def shape(rows: tuple[Row, ...]) -> tuple[int, ...]:
        stacked = zip(*(row.index for row in rows), strict=True)  # the hub's tensors are stacked on leading axes only
        return tuple(1 + max(at for at in positions if isinstance(at, int)) for positions in stacked) + rows[0].shape

    return {path: shape(rows) for path, rows in rows_by_path(expand(config)).items()}
