"""Block-scaled float8 checkpoints for tests, and what their formula says in float64."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tests.tiny import ConfigDict, variant

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
Arrays = dict[str, np.ndarray]
QUANTISED = re.compile(r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(experts\.(\d+\.)?)?\w+_proj)(\.weight)?")
"""What the released float8 models quantise: the decoder's linears, without router, head, norms and vision tower."""


def fp8_config(base: ConfigDict, block: tuple[int, int]) -> ConfigDict:
    """The config.json of a float8 checkpoint with scales for blocks `[rows, columns]`."""
    section: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return variant(base, quantization_config=section | {"weight_block_size": list(block), "ignored_layers": ["lm_head"]})


def quantise(tensors: Mapping[str, np.ndarray], block: tuple[int, int], scale_dtype: Any = np.float32) -> Arrays:
    """The linears replaced by float8 tensors of about their values and scales of no round value."""
    out = {}
    for key, tensor in tensors.items():
        if not QUANTISED.fullmatch(key):
            out[key] = tensor
            continue
        *lead, rows, columns = tensor.shape
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        shape = (*lead, -(-rows // block[0]), -(-columns // block[1]))
        scale = np.exp(rng.normal(-5, 1, shape)).astype(scale_dtype)
        out[key] = (tensor.astype(np.float32) / spread(scale, tensor.shape, block)).clip(-448, 448).astype(FP8)
        out[f"{key}_scale_inv"] = scale
    return out


def spread(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """float64 scales, each repeated over its block, cropped to `shape`."""
    wide = scale.astype(np.float64).repeat(block[0], axis=-2).repeat(block[1], axis=-1)
    return wide[..., : shape[-2], : shape[-1]]


def by_formula(tensors: Mapping[str, np.ndarray], block: tuple[int, int], dtype: Any) -> Arrays:
    """Every tensor as a number in float64, then rounded to `dtype` (ml_dtypes goes through float32, as torch does)."""
    out = {}
    for key, tensor in tensors.items():
        if key.endswith("_scale_inv"):
            continue
        exact = tensor.astype(np.float64)
        if tensor.dtype == FP8:
            exact *= spread(tensors[f"{key}_scale_inv"], tensor.shape, block)
        out[key] = exact.astype(np.float32).astype(dtype)
    return out
