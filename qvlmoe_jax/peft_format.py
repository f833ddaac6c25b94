"""Adapters in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`, both ways. No torch.

PEFT keeps a linear's factors as linears of their own, `lora_A [r,in]` and `lora_B [out,r]`. The fused experts are parameters,
not modules: `target_parameters` names them, their factors are `[E*r,in]` (expert by expert) and `[out,r*E]` (rank by rank), and
of two on one module the first (gate_up_proj) is the inner one, `experts.base_layer` (peft 0.21, `ParamWrapper`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import MappedFile, write_text
from qvlmoe_jax.hf import Row, expand, param_shapes, rows_by_path
from qvlmoe_jax.local_files import read_json
from qvlmoe_jax.lora import LoraConfig, adapter_paths, check_adapters, factor_shapes, linears, target_paths
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.safetensors_io import map_tensor, read_header, write_safetensors
from qvlmoe_jax.shards import ADAPTER_CONFIG
from qvlmoe_jax.whole_directory import whole_directory

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
FLOAT32 = np.dtype(np.float32)

# Of PEFT's options, those that change what is computed; each must be off.
_REFUSED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora",
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "kasa_config", "velora_config", "arrow_config",
    "monteclora_config",
)  # fmt: skip

# Of PEFT's `init_lora_weights`, those that leave the base's weights alone, spelt as `str(value).lower()`.
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def _is_expert(path: str) -> bool:
    return "/mlp/experts/" in path


def _module(row: Row) -> str:
    """The module (a linear) or parameter (experts) that PEFT targets for a tensor of the table."""
    return row.key if _is_expert(row.path) else row.key.removesuffix(".weight")


def _keys(row: Row, inner: bool) -> tuple[str, str]:
    """PEFT's names of the factors A and B. `inner`: of the experts' two wrappers, it is the inner one."""
    module = _module(row)
    if _is_expert(row.path):
        module = module.rpartition(".")[0] + (".base_layer" if inner else "")
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _rows(config: Qwen3VLMoeConfig, paths: list[str]) -> list[tuple[str, Row]]:
    by_path = rows_by_path(expand(config))
    return [(path, row) for path in paths for row in by_path[path]]


def _inner(row: Row, modules: frozenset[str]) -> bool:
    """Whether its wrapper is the inner one: both parameters of its layer's experts are among `modules`, the adapted ones."""
    return row.key.endswith("experts.gate_up_proj") and row.key.replace("gate_up_proj", "down_proj") in modules


def _is_named(row: Row, names: list[str]) -> bool:
    """Whether `target_parameters` means it: PEFT compares with the end of the whole name, from a dot on."""
    return any(f".{_module(row)}".endswith(f".{name}") for name in names)


def _to_peft(path: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One layer's factors, `[(E), in..., r]` and `[(E), r, out...]`, as PEFT has them."""
    r = a.shape[-1]
    if _is_expert(path):
        E = len(a)
        return a.reshape(E, -1, r).swapaxes(1, 2).reshape(E * r, -1), b.reshape(E, r, -1).transpose(2, 1, 0).reshape(-1, r * E)
    return a.reshape(-1, r).T, b.reshape(r, -1).T


def _from_peft(path: str, a: np.ndarray, b: np.ndarray, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    """The inverse of `_to_peft`; `shapes` are those of the layer's factors here."""
    r = shapes[0][-1]
    if _is_expert(path):
        E = shapes[0][0]
        a, b = a.reshape(E, r, -1).swapaxes(1, 2), b.reshape(-1, r, E).transpose(2, 1, 0)
    else:
        a, b = a.T, b.T
    return a.reshape(shapes[0]), b.reshape(shapes[1])


def save_adapter(
    directory: str | Path, config: Qwen3VLMoeConfig, adapters: Mapping[str, Any], lora: LoraConfig, *, base: str | None = None
) -> None:
    """Writes the new directory, which `peft.PeftModel.from_pretrained` loads onto transformers' model.

    Args:
      adapters: nested dicts of all adapter parameters that `lora` describes; written as float32.
      base: name or path of the model that they belong to, for PEFT to find it.
    Raises:
      CheckpointError: the directory exists and is not empty, or the adapters are not those that `lora` describes.
    """
    directory = Path(directory)
    check_adapters(config, adapters, lora)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not empty, expected a new directory")
    flat, paths = flatten(adapters), target_paths(config, lora.targets)
    rows = _rows(config, paths)
    adapted = frozenset(_module(row) for _, row in rows)
    shapes = param_shapes(config)
    sources: dict[str, tuple[str, Row, int]] = {}
    specs = {}
    for path, row in rows:
        layer = shapes[path][len(row.index) :]
        made = _to_peft(path, *(np.empty(shape, bool) for shape in factor_shapes(path, layer, lora.rank)))
        for which, (key, factor) in enumerate(zip(_keys(row, _inner(row, adapted)), made, strict=True)):
            sources[key], specs[key] = (path, row, which), (FLOAT32, factor.shape)

    def tensor(key: str) -> list[np.ndarray]:
        path, row, which = sources[key]
        layer = (np.asarray(flat[place][row.index], np.float32) for place in adapter_paths(path))
        return [np.ascontiguousarray(_to_peft(path, *layer)[which])]

    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": [_module(row) for path, row in rows if not _is_expert(path)],
        "target_parameters": [_module(row) for path, row in rows if _is_expert(path)] or None,
        "task_type": None,
    }
    with whole_directory(directory, suffix=".saving", overwrite=directory.exists()) as staging:
        write_safetensors(staging / WEIGHTS_FILE, specs, tensor)
        write_text(staging / ADAPTER_CONFIG, json.dumps(described, indent=2) + "\n")


def _read_config(directory: Path) -> tuple[Mapping[str, Any], int, float]:
    file = directory / ADAPTER_CONFIG
    tree = read_json(file)
    if not isinstance(tree, dict) or tree.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: no LoRA adapter of PEFT, expected peft_type LORA")
    on = [name for name in _REFUSED if tree.get(name)] + ["bias"] * (tree.get("bias", "none") != "none")
    if on:
        raise CheckpointError(f"{file}: {on[0]} = {json.dumps(tree[on[0]])} is not supported, expected plain LoRA")
    _refuse_changed_base(file, tree.get("init_lora_weights") or False)
    rank, alpha = tree.get("r"), tree.get("lora_alpha")
    wrong = bool in (type(rank), type(alpha))
    if wrong or not isinstance(rank, int) or not isinstance(alpha, int | float) or not (rank >= 1 and 0 < alpha < math.inf):
        raise CheckpointError(f"{file}: r = {rank!r} and lora_alpha = {alpha!r}, expected numbers more than 0")
    named = tree.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{file}: target_parameters = {named!r}, expected a list of names")
    return tree, rank, float(alpha)


def _refuse_changed_base(file: Path, init: Any) -> None:
    """PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA begin by changing the base's weights: the adapter belongs to those."""
    if str(init).lower() not in _PLAIN_INITS:
        raise CheckpointError(
            f"{file}: init_lora_weights = {json.dumps(init)}: the base weights were changed too, and with the original ones this "
            f"adapter computes something else; expected one of {', '.join(_PLAIN_INITS)}. Save it as plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or (LoftQ has no such way back) save the "
            "changed base model, take that as the base, and write true here"
        )


def load_adapter(directory: str | Path, config: Qwen3VLMoeConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """Reads a directory that PEFT or `save_adapter` wrote for this model.

    Returns:
      its `LoraConfig` (targets: the paths it adapts) and nested dicts of float32 numpy arrays. Layers that it leaves out while
      adapting others of their stack have zeros.
    Raises:
      CheckpointError: it is incomplete, of another model, or uses an option of PEFT's that is more than LoRA.
    """
    directory = Path(directory)
    tree, rank, alpha = _read_config(directory)
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory}: no {WEIGHTS_FILE}, expected it beside {ADAPTER_CONFIG}")
    header, mapped = read_header(file), MappedFile.open(file)
    shapes = linears(config)
    named = tree.get("target_parameters") or []
    rows = [(path, row) for path, row in _rows(config, list(shapes)) if not _is_expert(path) or _is_named(row, named)]
    modules = frozenset(_module(row) for _, row in rows)
    flat: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for path, row in rows:
        keys = _keys(row, _inner(row, modules))
        if not any(key in header for key in keys):
            continue
        layer = shapes[path][len(row.index) :]
        expected = factor_shapes(path, layer, rank)
        stored = _to_peft(path, *(np.empty(shape, bool) for shape in expected))
        for key, factor in zip(keys, stored, strict=True):
            found = header[key].shape if key in header else None
            if found != factor.shape:
                raise CheckpointError(f"{file}: {key!r} has shape {found and list(found)}, expected {list(factor.shape)}")
        a, b = (np.asarray(map_tensor(mapped, header[key]), np.float32) for key in keys)
        whole = factor_shapes(path, shapes[path], rank)
        for place, shape, factor in zip(adapter_paths(path), whole, _from_peft(path, a, b, expected), strict=True):
            flat.setdefault(place, np.zeros(shape, np.float32))[row.index] = factor
        used |= {*keys}
    if unknown := sorted(header.keys() - used):
        raise CheckpointError(f"{file}: {len(unknown)} tensors belong to nothing that can be adapted here, first {unknown[0]!r}")
    if not flat:
        raise CheckpointError(f"{file}: holds no adapter")
    paths = tuple(path for path in shapes if adapter_paths(path)[0] in flat)
    lora = LoraConfig(rank=rank, alpha=alpha, rslora=bool(tree.get("use_rslora")), targets=paths)
    return lora, nest(flat)
