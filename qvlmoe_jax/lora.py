"""Low-rank adapters (LoRA, arXiv 2106.09685): which weights take them, their places and shapes, and what they add to a weight.

The adapted product is `x W + scale (x A) B`. A weight `[lead..., in..., out...]` (lead: layers, experts) has factors
`A [lead..., in..., r]` and `B [lead..., r, out...]`. Numpy only: reading and merging a checkpoint needs no jax; `adapters` puts
them into a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.hf import param_shapes
from qvlmoe_jax.param_tree import check_shapes, flatten

# Path pattern -> how many of the weight's trailing dims are inputs and outputs: every linear map but the router, the patch
# embedding and the head. These are what adapters go to and what `base_quantization` quantises.
_LINEARS: tuple[tuple[str, int, int], ...] = (
    (r".*self_attn/[qkv]_proj/weight", 1, 2),
    (r".*self_attn/o_proj/weight", 2, 1),
    (r".*mlp/experts/gate_up_proj", 1, 2),
    (r".*mlp/experts/down_proj", 1, 1),
    (r".*mlp/(gate|up|down)_proj/weight", 1, 1),
    (r".*blocks/attn/qkv/weight", 1, 3),
    (r".*blocks/attn/proj/weight", 2, 1),
    (r".*visual/.*linear_fc[12]/weight", 1, 1),
)

PARTS = {
    "attention": r".*language_model/layers/.*self_attn/[qkvo]_proj/weight",
    "experts": r".*mlp/experts/(gate_up|down)_proj",
    "mlp": r".*language_model/layers/.*mlp/(gate|up|down)_proj/weight",
    "vision": r".*visual/blocks/.*/(qkv|proj|linear_fc[12])/weight",
    "merger": r".*visual/(merger|deepstack_merger_list)/linear_fc[12]/weight",
}
"""Names for `LoraConfig.targets`; anything else there is a regular expression over the weights' paths."""

Quantization = Literal["int8", "nf4"]


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes:
      rank: r. alpha: the factors' product is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank) (arXiv 2312.03732).
      targets: `attention`, `experts`, `mlp` (dense layers), `vision`, `merger`, or regular expressions over weights' paths.
      base_quantization: hold the linears of the base (adapted or not) as `int8` (absmax of each output) or `nf4` (QLoRA, arXiv
        2305.14314: blocks of 64 inputs); None: as they are.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: tuple[str, ...] = ("attention", "experts", "mlp")
    base_quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ConfigError(f"rank = {self.rank}, alpha = {self.alpha}, expected finite numbers more than 0")
        if self.base_quantization not in (None, "int8", "nf4"):
            raise ConfigError(f"base_quantization = {self.base_quantization!r}, expected int8, nf4 or null")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def linear_dims(path: str) -> tuple[int, int] | None:
    """How many trailing dims of the weight at `path` are inputs and outputs; None if it is no linear that can be adapted."""
    return next((dims for pattern, *dims in _LINEARS if re.fullmatch(pattern, path)), None)  # pyright: ignore[reportReturnType]


def linears(config: Qwen3VLMoeConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every weight that can be adapted (and is quantised)."""
    return {path: shape for path, shape in param_shapes(config).items() if linear_dims(path)}


def target_paths(config: Qwen3VLMoeConfig, targets: Iterable[str]) -> list[str]:
    """The weights that `targets` names, in the order of the parameter tree. A named part that the model lacks is no error.

    Raises:
      ConfigError: a regular expression that is none or matches nothing that can be adapted; nothing to adapt at all.
    """
    paths, hits = linears(config), set()
    targets = tuple(targets)
    for target in targets:
        try:
            found = {path for path in paths if re.fullmatch(PARTS.get(target, target), path)}
        except re.error as error:
            raise ConfigError(f"lora.targets: {target!r} is not a regular expression ({error})") from None
        if not found and target not in PARTS:
            raise ConfigError(
                f"lora.targets: {target!r} matches no weight that can be adapted, expected one of {', '.join(PARTS)} or a "
                f"regular expression over paths such as {next(iter(paths))!r}"
            )
        hits |= found
    if not hits:
        raise ConfigError(
            f"lora.targets = {list(targets)} names nothing that this model has, expected some of {', '.join(PARTS)}"
        )
    return [path for path in paths if path in hits]


def adapter_paths(path: str) -> tuple[str, str]:
    """Where the factors A and B of the weight at `path` are in the parameter tree: beside it."""
    stem = path.removesuffix("weight") if path.endswith("/weight") else path + "_"
    return stem + "lora_A", stem + "lora_B"


def is_adapter(path: str) -> bool:
    """Whether `path` is a factor of an adapter."""
    return path.endswith(("lora_A", "lora_B"))


def factor_shapes(path: str, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A `[lead..., in..., r]` and B `[lead..., r, out...]` for a weight `[lead..., in..., out...]`."""
    dims = linear_dims(path)
    assert dims is not None, path
    lead, split = len(shape) - sum(dims), len(shape) - dims[1]
    return (*shape[:split], rank), (*shape[:lead], rank, *shape[split:])


def adapter_shapes(config: Qwen3VLMoeConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every adapter parameter."""
    shapes, out = param_shapes(config), {}
    for path in target_paths(config, lora.targets):
        for place, shape in zip(adapter_paths(path), factor_shapes(path, shapes[path], lora.rank), strict=True):
            out[place] = shape
    return out


def check_adapters(config: Qwen3VLMoeConfig, adapters: Mapping[str, Any], lora: LoraConfig) -> None:
    """Refuses adapters other than those that `lora` describes: of another rank they would be scaled by another number.

    Args:
      adapters: nested dicts of arrays.
    Raises:
      CheckpointError: names the first that are missing, unknown or of another shape.
    """
    found = {path: tuple(leaf.shape) for path, leaf in flatten(adapters).items()}
    check_shapes("the adapters", adapter_shapes(config, lora), found, of="their LoraConfig")


def delta(a: np.ndarray, b: np.ndarray, num_inputs: int, scale: float) -> np.ndarray:
    """`scale * A B`, float32 `[lead..., in..., out...]`, what an adapter adds to its weight."""
    lead = a.ndim - 1 - num_inputs
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    product = np.matmul(a32.reshape(*a.shape[:lead], -1, a.shape[-1]), b32.reshape(*b.shape[: lead + 1], -1))
    return (np.float32(scale) * product).reshape(*a.shape[:-1], *b.shape[lead + 1 :])


def split_index(path: str, index: Sequence[slice]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """A slice of the weight at `path` as slices of A and B."""
    dims = linear_dims(path)
    assert dims is not None, path
    index = tuple(index)
    lead, split = len(index) - sum(dims), len(index) - dims[1]
    return (*index[:split], slice(None)), (*index[:lead], slice(None), *index[split:])


def as_lora(tree: Mapping[str, object]) -> LoraConfig:
    """A `LoraConfig` from its fields as JSON holds them."""
    fields = {**tree, "targets": tuple(tree["targets"])}  # pyright: ignore[reportArgumentType]
    return LoraConfig(**fields)  # pyright: ignore[reportArgumentType]
