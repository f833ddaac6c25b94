"""transformers' model as the oracle: the same weights, in torch, on the CPU.

Import this module through `pytest.importorskip("torch")` first: it needs torch and transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

# Tensors here are tiny: a second thread gains nothing, and its spinning barriers cost a minute beside a busy neighbour.
torch.set_num_threads(1)

MODELS = {
    "qwen3_vl_moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
}


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the array's memory where it can (bfloat16 passes through its bits)."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def state_dict(tensors: Mapping[str, np.ndarray], *, tied: bool) -> dict[str, torch.Tensor]:
    """Hub-layout tensors as transformers 5.x wants them: experts are [E,2I,H] and [E,H,I] there."""
    out = {k: to_torch(v).mT if ".mlp.experts." in k else to_torch(v) for k, v in tensors.items()}
    if tied:
        out["lm_head.weight"] = out["model.language_model.embed_tokens.weight"]
    return out


def build_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    attention: str = "sdpa",
    experts: str = "eager",
    dtype: torch.dtype = torch.float32,
) -> transformers.PreTrainedModel:
    """transformers' model for a `config.json` object with these weights (hub layout); every key must match."""
    config_class, model_class = MODELS[config["model_type"]]
    hf_config = config_class.from_dict(copy.deepcopy(dict(config)))
    options = {"experts_implementation": experts} if config["model_type"] == "qwen3_vl_moe" else {}
    model = model_class._from_config(hf_config, attn_implementation=attention, dtype=dtype, **options)
    model.load_state_dict(state_dict(tensors, tied=bool(config["tie_word_embeddings"])), strict=True)
    return model.eval().requires_grad_(False)


def run(model: transformers.PreTrainedModel, inputs: Mapping[str, np.ndarray], **options: Any) -> Any:
    """One forward pass of a fresh prompt; transformers' own output object."""
    model.model.rope_deltas = None  # state of the previous prompt, which the model would otherwise reuse
    arrays = {k: to_torch(v) for k, v in inputs.items()}
    return model(**arrays, use_cache=False, **options)


def logits(model: transformers.PreTrainedModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """fp32 logits [B,T,V]."""
    return run(model, inputs).logits.float().numpy()


def position_ids(model: transformers.PreTrainedModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """M-RoPE ids [3,B,T] of an input with pictures."""
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{k: to_torch(inputs[k]) for k in keys if k in inputs})[0].numpy()
