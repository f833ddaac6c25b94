"""The least a step must send between devices, for the mesh, dispatch and recomputation its config chooses, by mesh axes.

Beside it stands what the compiled program sends (`hlo`). Counted per device, on a ring: (n-1)/n of the whole for a gather or a
reduce-scatter, twice that for an all-reduce. Scalars, biases' and norms' gradients included; token ids and masks are not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.collectives import fsdp_axes
from qvlmoe_jax.lora import linear_dims
from qvlmoe_jax.quantise import quantised_bytes
from qvlmoe_jax.remat import is_recomputed
from qvlmoe_jax.sharding import BATCH, PICTURES, axes_in, axes_of, fit, partition_spec
from train.config import TrainConfig
from train.config_tree import plain
from train.flops import backward_parts, part_of
from train.parameters import parameters


@dataclass(frozen=True)
class Term:
    """One reason to send: `what` moves over `axes`, `bytes` per device and step."""

    what: str
    axes: tuple[str, ...]
    bytes: float


@dataclass(frozen=True)
class MeshSizes:
    """As much of a mesh as the sharding table reads."""

    shape: Mapping[str, int]


def least(config: TrainConfig, model: Qwen3VLMoeConfig) -> list[Term]:
    """The terms of one step, largest first."""
    sizes: dict[str, int] = plain(config.mesh)
    mesh = MeshSizes(sizes)
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for (what, axes), amount in [*_weights(config, model, mesh), *_tokens(config, model, mesh)]:
        axes = tuple(axis for axis in sizes if axis in axes and sizes[axis] > 1)
        if axes and amount:
            sums[what, axes] += amount
    return sorted((Term(what, axes, amount) for (what, axes), amount in sums.items()), key=lambda term: -term.bytes)


def _weights(config: TrainConfig, model: Qwen3VLMoeConfig, mesh: Any) -> list[tuple[tuple[str, tuple[str, ...]], float]]:
    """Gathering weights over FSDP and reducing gradients."""
    sizes: Mapping[str, int] = mesh.shape
    width = jnp.dtype(config.model.compute_dtype).itemsize
    trained, frozen = parameters(config, model)
    back = backward_parts(trained)
    quantisation = config.lora and config.lora.base_quantization
    terms: list[tuple[tuple[str, tuple[str, ...]], float]] = []
    for path, leaf in (trained | frozen).items():
        if "visual/" in path and not config.data.vision_rows:
            continue  # a step without rows of patches runs no tower
        shape = leaf.shape
        spec = partition_spec(path, shape, mesh)
        experts = "mlp/experts" in path
        gathered = tuple(a for i, entry in enumerate(spec) for a in fsdp_axes(entry) if not (experts and a == "expert"))
        held = axes_in(*spec)
        # what one device has in hand when it multiplies, as it is sent
        dims = linear_dims(path) if quantisation else None
        size = quantised_bytes(quantisation, shape, dims) if quantisation and dims else math.prod(shape) * width
        whole = size / math.prod(sizes[a] for a in held if a not in gathered)
        n = math.prod(sizes[a] for a in gathered)
        gathers = 2 if is_recomputed(path, config.backend) and part_of(path) in back else 1
        reduced = 1 if path in trained else 0
        name = "experts" if experts else "weights"
        # one axis after the other, the minor one first; backward the other way round
        for i, axis in enumerate(gathered):
            part = whole / math.prod(sizes[a] for a in gathered[:i]) * (sizes[axis] - 1) / sizes[axis]
            terms.append(((f"{name} gathered", (axis,)), config.data.accumulation * gathers * part))
            terms.append(((f"{name}' gradients scattered", (axis,)), config.data.accumulation * reduced * part))
        # axes that hold other tokens but the same weights
        rest = [a for a in (*BATCH, "context") if a not in held and sizes[a] > 1]
        m = math.prod(sizes[a] for a in rest)
        terms.append(((f"{name}' gradients summed", tuple(rest)), reduced * 2 * whole / n * (m - 1) / m))
    return terms


def _tokens(config: TrainConfig, model: Qwen3VLMoeConfig, mesh: Any) -> list[tuple[tuple[str, tuple[str, ...]], float]]:
    """Tokens to the experts and back, keys and values over context, partial sums over tensor."""
    sizes: Mapping[str, int] = mesh.shape
    text, data = model.text_config, config.data
    width = jnp.dtype(config.model.compute_dtype).itemsize
    rows, columns = data.batch_rows, data.sequence_length
    rows_spec, columns_spec = fit((BATCH, "context"), (rows, columns), mesh)
    local = rows * columns / math.prod(sizes[a] for a in axes_in(rows_spec, columns_spec))
    activations = config.data.accumulation * local * text.hidden_size * width
    again = config.backend.remat != "none"
    kinds = text.layer_kinds()
    e, c, t = sizes["expert"], sizes["context"], sizes["tensor"]
    heads = text.num_key_value_heads / (t if text.num_key_value_heads % t == 0 else 1)
    moe, k = kinds.count("moe"), text.num_experts_per_tok
    if config.backend.dispatch == "all_to_all":  # rows out and back, forward and backward; recomputing repeats both; even routing
        to_experts = moe * (6 if again else 4) * k * activations * (e - 1) / e
    else:  # forward: tokens gathered, results scattered; backward the same reversed; recomputing gathers the tokens once more
        to_experts = moe * (5 if again else 4) * activations * (e - 1)
    keys = config.data.accumulation * local * heads * text.head_dim * 2 * width
    # rows of patches are spread over context too; their tokens, and what DeepStack takes, go to where the text is
    back = backward_parts(parameters(config, model)[0])
    groups, vision = data.num_groups(config.mesh.batch_shards), model.vision_config
    (picture_rows,) = fit((PICTURES,), (groups * data.vision_rows,), mesh)
    spread = "context" in axes_of(picture_rows)
    merged = groups * data.vision_rows * data.row_patches // vision.merge_unit / math.prod(sizes[a] for a in BATCH)
    levels = 1 + len(vision.deepstack_visual_indexes)
    seen = config.data.accumulation * spread * merged * levels * vision.out_hidden_size * width
    patches = config.data.accumulation * merged * vision.merge_unit / (c if spread else 1) * width
    # two sums forward, two backward; recomputing repeats the first, the second's result is not needed again. The vocabulary is
    # split too: one sum for the embedding, one for the gradient of the head's input.
    passes = 5 if again else 4
    summed = (passes * len(kinds) + 2) * activations
    summed += vision.depth * (passes if "vision" in back else 2) * vision.hidden_size * patches
    summed += levels * (vision.out_hidden_size / vision.merge_unit + ("vision" in back) * vision.hidden_size) * patches
    return [
        (("tokens to experts", ("expert",)), to_experts),
        (("keys and values", ("context",)), len(kinds) * (3 if again else 2) * keys * (c - 1)),
        (("visual tokens", ("context",)), (2 if "merger" in back else 1) * seen * (c - 1) / c),
        (("partial sums", ("tensor",)), 2 * summed * (t - 1) / t),
    ]


def by_axes(terms: list[Term]) -> dict[tuple[str, ...], float]:
    """Sums over what moves."""
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for term in terms:
        sums[term.axes] += term.bytes
    return dict(sums)
