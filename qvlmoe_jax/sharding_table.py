"""The ONE table of parameter path -> mesh axes. No jax here: the converter cuts files along it without starting jax.

Axes (all of them always exist; unused ones have size 1): `data` replicates parameters, `fsdp` shards them, `expert` spreads
the experts, `tensor` splits heads / F / vocabulary, `context` splits the sequence. Batch rows go over data, fsdp and expert.
"""

from __future__ import annotations

import re
from typing import Any

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")
HIDDEN = (BATCH, "context", None)  # hidden states [B,T,D]
PICTURES = (*BATCH, "context")  # rows of patches: the tower would do the same work on every device of `context`
# Parameters other than the experts have no expert dim; there the expert axis is one more axis of FSDP.
FSDP = ("fsdp", "expert")
VOCAB = ("tensor", "fsdp", "expert")

# Path pattern -> spec over the TRAILING dims (stacking dims in front are never sharded). Patterns are matched whole and are
# disjoint: a leaf that hits no row, or two, is an error.
TABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # The vocabulary dim, not D: a table sharded over D is rematerialised whole at the gather.
    (r"(.*/)?embed_tokens/weight", (VOCAB, None)),
    (r"(.*/)?lm_head/weight", (None, VOCAB)),
    (r"(.*/)?layers(/\d+)?/self_attn/[qkv]_proj/weight", (FSDP, "tensor", None)),
    (r"(.*/)?layers(/\d+)?/self_attn/o_proj/weight", ("tensor", None, FSDP)),
    (r"(.*/)?layers(/\d+)?/self_attn/[qk]_norm/weight", (None,)),
    (r"(.*/)?layers(/\d+)?/(input|post_attention)_layernorm/weight", (None,)),
    (r"(.*/)?layers(/\d+)?/mlp/gate/weight", (FSDP, None)),
    (r"(.*/)?layers(/\d+)?/mlp/experts/gate_up_proj", ("expert", "fsdp", None, "tensor")),
    (r"(.*/)?layers(/\d+)?/mlp/experts/down_proj", ("expert", ("tensor", "fsdp"), None)),
    (r"(.*/)?layers(/\d+)?/mlp/(gate|up)_proj/weight", (FSDP, "tensor")),
    (r"(.*/)?layers(/\d+)?/mlp/down_proj/weight", ("tensor", FSDP)),
    (r"(.*/)?language_model/norm/weight", (None,)),
    (r"(.*/)?patch_embed/proj/weight", (None, FSDP)),
    # Rows as well: scattered over lanes of D that a shard does not fill, the TPU compiler all-reduces the gradient.
    (r"(.*/)?pos_embed/weight", (FSDP, None)),
    (r"(.*/)?patch_embed/proj/bias", (None,)),
    (r"(.*/)?blocks/attn/qkv/weight", (FSDP, None, "tensor", None)),
    (r"(.*/)?blocks/attn/qkv/bias", (None, "tensor", None)),
    (r"(.*/)?blocks/attn/proj/weight", ("tensor", None, FSDP)),
    (r"(.*/)?blocks/attn/proj/bias", (None,)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc1/weight", (FSDP, "tensor")),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc1/bias", ("tensor",)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc2/weight", ("tensor", FSDP)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc2/bias", (None,)),
    (r"(.*/)?(blocks/norm[12]|merger/norm|deepstack_merger_list/norm)/(weight|bias)", (None,)),
    # Adapters (`lora`): A [in..., r] has its weight's inputs, B [r, out...] its outputs; what is left takes FSDP.
    (r"(.*/)?layers(/\d+)?/self_attn/[qkv]_proj/lora_A", (FSDP, None)),
    (r"(.*/)?layers(/\d+)?/self_attn/[qkv]_proj/lora_B", (None, "tensor", FSDP)),
    (r"(.*/)?layers(/\d+)?/self_attn/o_proj/lora_A", ("tensor", FSDP, None)),
    (r"(.*/)?layers(/\d+)?/mlp/experts/gate_up_proj_lora_A", ("expert", "fsdp", None)),
    (r"(.*/)?layers(/\d+)?/mlp/experts/gate_up_proj_lora_B", ("expert", None, None, ("tensor", "fsdp"))),
    (r"(.*/)?layers(/\d+)?/mlp/experts/down_proj_lora_A", ("expert", ("tensor", "fsdp"), None)),
    (r"(.*/)?layers(/\d+)?/mlp/experts/down_proj_lora_B", ("expert", None, "fsdp")),
    (r"(.*/)?layers(/\d+)?/mlp/(gate|up)_proj/lora_A", (FSDP, None)),
    (r"(.*/)?layers(/\d+)?/mlp/(gate|up)_proj/lora_B", (None, VOCAB)),
    (r"(.*/)?layers(/\d+)?/mlp/down_proj/lora_A", (VOCAB, None)),
    (r"(.*/)?layers(/\d+)?/(self_attn/o_proj|mlp/down_proj)/lora_B", (None, FSDP)),
    (r"(.*/)?blocks/attn/qkv/lora_A", (FSDP, None)),
    (r"(.*/)?blocks/attn/qkv/lora_B", (None, None, "tensor", FSDP)),
    (r"(.*/)?blocks/attn/proj/lora_A", ("tensor", FSDP, None)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc1/lora_A", (FSDP, None)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc1/lora_B", (None, VOCAB)),
    (r"(.*/)?(blocks/mlp|merger|deepstack_merger_list)/linear_fc2/lora_A", (VOCAB, None)),
    (r"(.*/)?(blocks/attn/proj|(blocks/mlp|merger|deepstack_merger_list)/linear_fc2)/lora_B", (None, FSDP)),
)
_COMPILED = tuple((re.compile(pattern), spec) for pattern, spec in TABLE)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def axes_in(*entries: Any) -> list[str]:
    """The mesh axes of a PartitionSpec's entries, in their order."""
    return [axis for entry in entries for axis in axes_of(entry)]


def table_row(path: str) -> tuple[Any, ...]:
    """The spec over trailing dims of the one table row that `path` (keys joined by '/') hits. A quantised weight's codes and
    scales have the weight's own.

    Raises:
      KeyError: no row, or more than one, matches: the table and the tree have drifted apart.
    """
    weight = path.removesuffix("/codes").removesuffix("/scales")
    hits = [spec for pattern, spec in _COMPILED if pattern.fullmatch(weight)]
    if len(hits) != 1:
        raise KeyError(f"parameter {path!r} hits {len(hits)} rows of the sharding table, expected exactly one")
    return hits[0]
