"""Does a checkpoint hold what the table says? Every tensor is accounted for before one byte of weights is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.conversion_record import WEIGHT_DTYPES
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.fp8 import FP8, SCALE_SUFFIX, scale_shape, split_ranges
from qvlmoe_jax.hf import LM_HEAD_KEY, ExpertLayout, Row, expand
from qvlmoe_jax.safetensors_io import DTYPE_NAMES, TensorInfo
from qvlmoe_jax.shards import listed

FUSED: tuple[ExpertLayout, ...] = ("hub", "v5")
GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Match:
    """A checkpoint's tensors laid against the table.

    Attributes:
      rows: one per tensor, with the shapes of the checkpoint's own layout.
      expert_layout: the orientation found; None without fused experts.
      tied_lm_head: a tied model's file repeats the embedding as `lm_head.weight`.
      names: the table's name -> the name on disk, of every tensor, scales included.
      scales: the table's name of a float8 tensor -> its scales' name on disk.
    """

    rows: tuple[Row, ...]
    expert_layout: ExpertLayout | None
    tied_lm_head: bool
    names: Mapping[str, str]
    scales: Mapping[str, str]


def named(keys: Iterable[str]) -> str:
    """The first few of many names, on one line."""
    return listed([repr(key) for key in sorted(keys)])


def _is_fused(key: str) -> bool:
    return key.endswith((f".experts.{GATE_UP}", f".experts.{DOWN}"))


def detect_expert_layout(config: Qwen3VLMoeConfig, tensors: Mapping[str, TensorInfo]) -> ExpertLayout | None:
    """The orientation of the fused experts, decided by each layer's pair of tensors and agreed on by all layers.

    One tensor alone may be square (2F == D or F == D) and fit both layouts; as both cannot hold, the pair always decides.
    (transformers decides tensor by tensor and loads square ones silently wrong: its issue 47031.)

    Raises:
      CheckpointError: a tensor fits neither layout, the two of a layer contradict each other, or two layers do.
    """
    shapes = {layout: {row.key: row.hf_shape for row in expand(config, layout) if _is_fused(row.key)} for layout in FUSED}
    decided: dict[ExpertLayout, str] = {}
    for gate_up in (key for key in shapes["hub"] if key.endswith(GATE_UP)):
        down = gate_up.removesuffix(GATE_UP) + DOWN
        fits = []
        for key in (gate_up, down):
            found = tensors[key].shape
            fits.append({layout for layout in FUSED if shapes[layout][key] == found})
            if not fits[-1]:
                hub, v5 = (list(shapes[layout][key]) for layout in FUSED)
                expected = f"{hub} (hub layout) or {v5} (5.x layout)" if hub != v5 else str(hub)
                raise CheckpointError(f"{tensors[key].file}: tensor {key!r} has shape {list(found)}, expected {expected}")
        common = fits[0] & fits[1]
        if not common:
            raise CheckpointError(
                f"{tensors[gate_up].file}: {gate_up!r} {list(tensors[gate_up].shape)} is in the {min(fits[0])} layout "
                f"but {down!r} {list(tensors[down].shape)} in the {min(fits[1])} layout, expected one layout for both"
            )
        decided.setdefault(common.pop(), gate_up)
    if len(decided) > 1:
        raise CheckpointError(
            f"{tensors[decided['hub']].file}: {decided['hub']!r} is in the hub layout but {decided['v5']!r} is in the v5 layout, "
            "expected one layout for all layers"
        )
    return next(iter(decided), None)


def table_names(keys: Iterable[str]) -> dict[str, str]:
    """Name on disk -> the table's name. A model saved without its head (`Qwen3VLMoeModel`) lacks the leading `model.`."""
    base = ("language_model.", "visual.")
    return {key: f"model.{key}" if key.startswith(base) else key for key in keys}


def _refuse_part(found: set[str], where: str) -> None:
    """A text or vision model saved alone has no prefix at all: say so, rather than list what is missing."""
    for prefix, part in (("layers.", "text decoder (Qwen3VLMoeTextModel)"), ("blocks.", "vision tower (Qwen3VLMoeVisionModel)")):
        if any(key.startswith(prefix) for key in found):
            raise CheckpointError(
                f"{where}: holds a {part} alone, its tensors begin with {prefix!r}; expected the whole model, save that instead"
            )


def _find_scales(config: Qwen3VLMoeConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Names of the float8 tensors' scales, by the tensors' own."""
    scales = {}
    for key, info in tensors.items():
        if info.dtype != FP8:
            continue
        name = key + SCALE_SUFFIX
        if config.fp8_block is None:
            raise CheckpointError(
                f"{info.file}: tensor {key!r} is F8_E4M3, but config.json has no quantization_config to say how it is scaled"
            )
        if name not in tensors:
            raise CheckpointError(f"{info.file}: float8 tensor {key!r} has no {name!r}, expected its scales")
        expected = scale_shape(info.shape, config.fp8_block) if len(info.shape) > 1 else None
        scale = tensors[name]
        if scale.shape != expected or DTYPE_NAMES[scale.dtype] not in ("F32", "BF16"):
            raise CheckpointError(
                f"{scale.file}: {name!r} is {DTYPE_NAMES[scale.dtype]} {list(scale.shape)}, "
                f"expected F32 {list(expected or ())} for blocks of {list(config.fp8_block)}"
            )
        scales[key] = name
    return scales


def match(config: Qwen3VLMoeConfig, found: Mapping[str, TensorInfo], where: str) -> Match:
    """Lays a checkpoint's tensors against the table, by name, shape and dtype.

    Args:
      found: the tensors by their names on disk.
      where: the directory, for messages.
    Raises:
      CheckpointError: names what is unknown, missing, ambiguous, of another shape, or of a dtype that is not a weight's.
    """
    names: dict[str, str] = {}
    for on_disk, key in table_names(found).items():
        if key in names:
            raise CheckpointError(f"{where}: tensors {names[key]!r} and {on_disk!r} are the same one, expected one of them")
        names[key] = on_disk
    tensors = {key: found[name] for key, name in names.items()}
    scales = _find_scales(config, tensors)
    scale_names = set(scales.values())
    per_expert = any(".mlp.experts.0.gate_proj.weight" in key for key in tensors)
    experts = config.text_config.num_experts
    if per_expert and experts > len(tensors):  # said before the table of so many is made
        raise CheckpointError(f"{where}: {len(tensors)} tensors, expected some for each of the {experts} experts of config.json")
    expected = {row.key for row in expand(config, "per_expert" if per_expert else "hub")}
    weights = set(tensors) - scale_names
    tied_lm_head = config.tie_word_embeddings and LM_HEAD_KEY in weights
    missing, unknown = expected - weights, weights - expected - ({LM_HEAD_KEY} if tied_lm_head else set())
    if missing:
        _refuse_part(weights, where)
        also = f"; found instead {named(unknown)}" if unknown else ""
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} expected tensors missing: {named(missing)}{also}; "
            "expected the tensors that config.json describes"
        )
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} unknown tensors: {named(unknown)}; expected only those config.json describes"
        )

    for key in sorted(weights):
        info, name = tensors[key], DTYPE_NAMES[tensors[key].dtype]
        if name not in WEIGHT_DTYPES and key not in scales:
            raise CheckpointError(f"{info.file}: tensor {key!r} has dtype {name}, expected one of {', '.join(WEIGHT_DTYPES)}")
    layout: ExpertLayout | None = "per_expert" if per_expert else detect_expert_layout(config, tensors)
    rows = expand(config, layout or "hub")
    for row in rows:
        info = tensors[row.key]
        if info.shape != row.hf_shape:
            raise CheckpointError(f"{info.file}: tensor {row.key!r} has shape {list(info.shape)}, expected {list(row.hf_shape)}")
        if row.key in scales:
            try:
                split_ranges(row)
            except ValueError:
                raise CheckpointError(f"{info.file}: tensor {row.key!r} is float8, expected a convolution in BF16") from None
    return Match(rows, layout, tied_lm_head, names, {key: names[scale] for key, scale in scales.items()})
