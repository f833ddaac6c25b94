"""What is in a model directory? Read from headers and records alone: no weights, no jax."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.progress import human_bytes
from qvlmoe_jax.checkpoint import ConvertedWeights, TrainedWeights, Weights, open_weights
from qvlmoe_jax.hf import Row, expand
from qvlmoe_jax.hf_weights import HFWeights

LARGEST = 5
PARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("vision tower", lambda path: "visual/" in path and "merger" not in path),
    ("vision mergers", lambda path: "visual/" in path),
    ("embedding", lambda path: "embed_tokens" in path),
    ("attention", lambda path: "self_attn" in path),
    ("experts", lambda path: "mlp/experts" in path),
    ("routers", lambda path: "mlp/gate/" in path),
    ("dense MLPs", lambda path: "mlp/" in path),
    ("norms", lambda path: "norm" in path),
    ("head", lambda path: True),
)


def inspect(path: str | Path, *, report: Callable[[str], None] = print) -> None:
    """Prints parameters by part, active parameters, bytes, dtypes, layout and the largest arrays of a model directory.

    Raises:
      CheckpointError, ConfigError: it is not a whole one.
    """
    weights = open_weights(path)
    config, text = weights.config, weights.config.text_config
    dtypes = _dtypes(weights)
    rows = expand(config)
    kind = {HFWeights: "Hugging Face checkpoint", ConvertedWeights: "converted directory", TrainedWeights: "training run"}
    report(f"{path}: {kind[type(weights)]}, {config.model_type}, {_layout(weights)}")
    report(
        f"text {text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads "
        f"({text.num_key_value_heads} kv)"
        + (f", {text.num_experts} experts, {text.num_experts_per_tok} per token" if text.num_experts else "")
        + f"; vision {config.vision_config.depth} blocks, width {config.vision_config.hidden_size}; "
        + ("tied head" if config.tie_word_embeddings else "untied head")
    )
    report("")
    report(f"{'part':<16}{'tensors':>9}{'parameters':>18}{'bytes':>20}{'share':>8}  dtype")
    total = sum(math.prod(row.hf_shape) for row in rows)
    groups: dict[str, list[Row]] = {name: [] for name, _ in PARTS}
    for row in rows:
        groups[next(name for name, holds in PARTS if holds(row.path))].append(row)
    for name, members in groups.items():
        if members:
            report(_line(name, members, dtypes, total))
    report(_line("total", list(rows), dtypes, total))
    experts = sum(math.prod(row.hf_shape) for row in groups["experts"])
    if experts:
        vision = sum(math.prod(row.hf_shape) for name in ("vision tower", "vision mergers") for row in groups[name])
        active = total - vision - experts + experts * text.num_experts_per_tok // text.num_experts
        report(f"active per text token: {active:,} ({text.num_experts_per_tok} of {text.num_experts} experts, without vision)")
    report("")
    report("largest arrays (as parameters, layers stacked):")
    sizes = {path: math.prod(shape) for path, shape in weights.shapes.items()}
    for path in sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]:
        size, dtype = human_bytes(sizes[path] * dtypes[path].itemsize), dtypes[path].name
        report(f"  {size:>12}  {dtype:<9} {path} {list(weights.shapes[path])}")


def _line(name: str, rows: list[Row], dtypes: dict[str, np.dtype], total: int) -> str:
    parameters = sum(math.prod(row.hf_shape) for row in rows)
    size = sum(math.prod(row.hf_shape) * dtypes[row.path].itemsize for row in rows)
    kinds = Counter(dtypes[row.path].name for row in rows)
    return f"{name:<16}{len(rows):>9,}{parameters:>18,}{size:>20,}{100 * parameters / total:>7.1f}%  {', '.join(sorted(kinds))}"


def _layout(weights: Weights) -> str:
    if isinstance(weights, HFWeights):
        layout = weights.match.expert_layout
        files = f"{len(weights.files.files)} files, {sum(t.nbytes for t in weights.files.tensors.values()):,} bytes on disk"
        fp8 = f", float8 in blocks of {list(weights.config.fp8_block or ())}" if weights.quantised else ""
        return f"{f'{layout} expert layout' if layout else 'no experts'}{fp8}, {files}"
    if isinstance(weights, ConvertedWeights):
        source = weights.conversion.get("source") or {}
        revision = f" at {source.get('revision')}" if source.get("revision") else ""
        return f"converted from {source.get('name')}{revision}, table version {weights.conversion.get('table_version')}"
    return f"step {weights.step}"


def _dtypes(weights: Weights) -> dict[str, np.dtype]:
    """As on disk: a float8 tensor counts its own bytes."""
    if isinstance(weights, HFWeights):
        tensors, names = weights.files.tensors, weights.match.names
        own = {path: {tensors[names[row.key]].dtype for row in rows} for path, rows in weights.rows.items()}
        return {path: found.pop() if len(found) == 1 else weights.dtypes[path] for path, found in own.items()}
    return weights.dtypes
