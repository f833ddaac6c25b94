"""Does a checkpoint hold what the table says? Every tensor is accounted for before one byte of weights is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import LM_HEAD_KEY, ExpertLayout, Row, expand
from qvlmoe_jax.safetensors_io import DTYPE_NAMES, TensorInfo
from qvlmoe_jax.shards import listed

WEIGHT_DTYPES = ("BF16", "F16", "F32")
LAYOUTS: tuple[ExpertLayout, ...] = ("hub", "v5")
GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Match:
    """A checkpoint's tensors laid against the table.

    Attributes:
      rows: one per tensor, with the shapes of the checkpoint's own layout.
      expert_layout: the orientation found; None without fused experts.
      tied_lm_head: a tied model's file repeats the embedding as `lm_head.weight`.
    """

    rows: tuple[Row, ...]
    expert_layout: ExpertLayout | None
    tied_lm_head: bool


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
    shapes = {layout: {row.key: row.hf_shape for row in expand(config, layout) if _is_fused(row.key)} for layout in LAYOUTS}
    decided: dict[ExpertLayout, str] = {}
    for gate_up in (key for key in shapes["hub"] if key.endswith(GATE_UP)):
        down = gate_up.removesuffix(GATE_UP) + DOWN
        fits = []
        for key in (gate_up, down):
            found = tensors[key].shape
            fits.append({layout for layout in LAYOUTS if shapes[layout][key] == found})
            if not fits[-1]:
                hub, v5 = (list(shapes[layout][key]) for layout in LAYOUTS)
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


def match(config: Qwen3VLMoeConfig, tensors: Mapping[str, TensorInfo], where: str) -> Match:
    """Lays a checkpoint's tensors against the table, by name, shape and dtype.

    Args:
      where: the directory, for messages.
    Raises:
      CheckpointError: names what is unknown, missing, ambiguous, of another shape, or of a dtype that is not a weight's.
    """
    expected = {row.key for row in expand(config)}
    found = set(tensors)
    tied_lm_head = config.tie_word_embeddings and LM_HEAD_KEY in found
    missing, unknown = expected - found, found - expected - ({LM_HEAD_KEY} if tied_lm_head else set())
    if missing:
        also = f"; found instead {named(unknown)}" if unknown else ""
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} expected tensors missing: {named(missing)}{also}; "
            "expected the tensors that config.json describes"
        )
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} unknown tensors: {named(unknown)}; expected only those config.json describes"
        )

    for key, info in tensors.items():
        name = DTYPE_NAMES[info.dtype]
        if name not in WEIGHT_DTYPES:
            raise CheckpointError(f"{info.file}: tensor {key!r} has dtype {name}, expected one of {', '.join(WEIGHT_DTYPES)}")
    layout = detect_expert_layout(config, tensors)
    rows = expand(config, layout or "hub")
    for row in rows:
        info = tensors[row.key]
        if info.shape != row.hf_shape:
            raise CheckpointError(f"{info.file}: tensor {row.key!r} has shape {list(info.shape)}, expected {list(row.hf_shape)}")
    return Match(rows, layout, tied_lm_head)
