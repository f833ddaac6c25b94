"""Random Hugging Face checkpoints for tests, made with numpy and the safetensors package (not with the code under test's I/O).

The weights are of order one, so that every bug moves the logits: norm scales 1 + 0.3 N(0,1), biases 0.2 N, embeddings 0.7 N,
linears 1.2 / sqrt(fan_in) N. HF's own initialisation hides most of them.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import DTypeLike

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.hf import expand


def _fan_in(key: str, shape: Sequence[int]) -> int:
    """Inputs of a linear in the hub's orientation: fused experts are `[E, in, out]`, everything else `[out, in...]`."""
    return shape[1] if ".experts." in key else math.prod(shape[1:])


def _random_tensor(key: str, shape: Sequence[int], seed: int) -> np.ndarray:
    # one generator per name: a tensor's values do not depend on which other tensors the config has
    noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape, np.float32)
    if key.endswith(".bias"):
        return 0.2 * noise
    if "embed_tokens" in key or "pos_embed" in key:
        return 0.7 * noise
    if len(shape) == 1:
        return 1 + 0.3 * noise
    return 1.2 / math.sqrt(_fan_in(key, shape)) * noise


def random_hf_tensors(
    config: Qwen3VLMoeConfig | Mapping[str, Any],
    seed: int = 0,
    dtype: DTypeLike = np.float32,
    layout: Literal["hub", "v5"] = "hub",
) -> dict[str, np.ndarray]:
    """HF key -> C-contiguous array for a whole model. Both layouts of one seed are the same model.

    Args:
      config: a config, or a `config.json` object.
      dtype: of every tensor (`ml_dtypes.bfloat16` too); the values are drawn in float32 and rounded.
      layout: orientation of the fused experts, `[E,in,out]` (hub) or `[E,out,in]` (transformers 5.x).
    """
    if not isinstance(config, Qwen3VLMoeConfig):
        config = Qwen3VLMoeConfig.from_hf(config)
    tensors = {}
    for row in expand(config):
        tensor = _random_tensor(row.key, row.hf_shape, seed)
        if layout == "v5" and ".experts." in row.key:
            tensor = tensor.swapaxes(1, 2)
        tensors[row.key] = np.ascontiguousarray(tensor.astype(dtype))
    return tensors


def write_hf_checkpoint(
    directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1
) -> Path:
    """Writes config.json and `tensors` into `directory` (created): one model.safetensors, or `shards` files with an index."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    if shards == 1:
        safetensors.numpy.save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        shard = {key: contiguous[key] for key in list(contiguous)[i::shards]}
        safetensors.numpy.save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total_size = sum(tensor.nbytes for tensor in contiguous.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def split_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hub layout -> three linears `[out,in]` for each expert, as quantisers and some trainers write them."""
    out = {}
    for key, tensor in tensors.items():
        base, fused, name = key.partition(".mlp.experts.")
        if not fused:
            out[key] = tensor
            continue
        width = tensor.shape[2] // 2
        parts = {"gate": tensor[..., :width], "up": tensor[..., width:]} if name == "gate_up_proj" else {"down": tensor}
        for part, stack in parts.items():
            for e, linear in enumerate(stack):
                out[f"{base}.mlp.experts.{e}.{part}_proj.weight"] = np.ascontiguousarray(linear.T)
    return out


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data, unchecked, for a test to damage."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file with any header, true or not; `length` is what it claims of itself."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, byte for byte."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
