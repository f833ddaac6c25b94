"""What one device does in a step, by formula: FLOPs the model needs, FLOPs executed, bytes through its memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.collectives import fsdp_axes
from qvlmoe_jax.sharding import axes_in, partition_spec
from train.config import TrainConfig
from train.config_tree import plain
from train.feed import Counts
from train.flops import attention_flops, backward_parts, forward_flops, step_flops
from train.parameters import parameters
from train.roofline import Work
from train.wire import MeshSizes


def full_counts(config: TrainConfig) -> Counts:
    """A step of full rows: each text row one document, each vision row one picture."""
    data = config.data
    rows = data.accumulation * data.batch_rows
    pictures = data.accumulation * data.num_groups(config.mesh.batch_shards) * data.vision_rows
    T, P = data.sequence_length, data.row_patches
    return Counts(
        tokens=rows * T,
        slots=rows * T,
        samples=rows,
        token_pairs=rows * T * (T + 1) // 2,
        patches=pictures * P,
        patch_slots=pictures * P,
        frame_pairs=pictures * P * P,
    )


def work(config: TrainConfig, model: Qwen3VLMoeConfig, devices: int, wire_bytes: float) -> Work:
    """One device's share of a step, evenly spread (routing balanced)."""
    counts = full_counts(config)
    trained, frozen = parameters(config, model)
    needed = step_flops(model, counts, trained, frozen)
    forward = forward_flops(model, counts)
    text = model.text_config
    experts = 2.0 * counts.tokens * text.num_experts_per_tok * 3 * text.hidden_size * text.moe_intermediate_size
    again = {
        "none": 0.0,
        "full": sum(forward[part] for part in ("vision", "text") if part in backward_parts(trained)),
        "dots": experts * text.layer_kinds().count("moe"),  # ragged products are no dots: they are recomputed
    }[config.backend.remat]
    # Shards of `context` are consecutive columns: the last sees (2 - 1/c) times the average of a document's causal pairs, and
    # the others wait for it.
    passes = {"none": 3, "dots": 4, "full": 4}[config.backend.remat]
    waiting = passes * attention_flops(model, counts)["text"] * (1 - 1 / plain(config.mesh)["context"])
    return Work(needed / devices, (needed + again + waiting) / devices, hbm_bytes(config, model, counts, devices), wire_bytes)


def hbm_bytes(config: TrainConfig, model: Qwen3VLMoeConfig, counts: Counts, devices: int) -> float:
    """Bytes read and written by one device in a step: optimizer, weights, activations. A count of tensors, not a measurement."""
    sizes: Mapping[str, int] = plain(config.mesh)
    mesh = MeshSizes(sizes)
    width = jnp.dtype(config.model.compute_dtype).itemsize
    master = jnp.dtype(config.model.param_dtype).itemsize
    total = 0.0
    trained, frozen = parameters(config, model)
    for path, leaf in (trained | frozen).items():
        shape = leaf.shape
        spec = partition_spec(path, shape, mesh)
        held = axes_in(*spec)
        local = math.prod(shape) / math.prod(sizes[a] for a in held)
        gathered = [a for entry in spec for a in fsdp_axes(entry) if not ("mlp/experts" in path and a == "expert")]
        whole = local * math.prod(sizes[a] for a in gathered)
        # written and read by each of two gathers, read backward, its gradient written and read
        total += config.data.accumulation * whole * width * (7 if path in trained else 5)
        if path in trained:  # parameter and two moments read and written, gradient written and read, the cast
            total += local * (6 * master + 2 * 4 + master + width)
    text, vision = model.text_config, model.vision_config
    passes = {"none": 3, "dots": 3.5, "full": 4}[config.backend.remat]  # forward, again, and twice for the backward
    D, F, k = text.hidden_size, text.moe_intermediate_size, text.num_experts_per_tok
    heads = text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    per_token = sum(
        12 * D + 4 * heads + (k * (6 * D + 6 * F) if kind == "moe" else 6 * text.intermediate_size) for kind in text.layer_kinds()
    )
    per_patch = vision.depth * (16 * vision.hidden_size + 4 * vision.intermediate_size)
    activations = passes * width * (counts.tokens * per_token + counts.patches * per_patch)
    # Logits are written and read for the loss and for their gradient, which two products read; a chunk's gradient of the head is
    # added to those before it.
    logits = counts.tokens * text.vocab_size * 3 * (4 + width)
    chunks = max(1, counts.tokens / devices / config.loss.chunk_tokens)
    head = "embed_tokens" if model.tie_word_embeddings else "lm_head"
    added = 2 * width * chunks * D * text.vocab_size / sizes["tensor"] if any(head in path for path in trained) else 0.0
    return total + added + (activations + logits) / devices
