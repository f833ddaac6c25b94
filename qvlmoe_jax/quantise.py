"""Weights in 8 or 4 bits: the numbers of QLoRA's base, made and read back in numpy. `quantised` holds them in a model.

A weight is `[lead..., in..., out...]`. int8: `round(127 w / absmax)`, absmax over all inputs of one output. nf4 (QLoRA, arXiv
2305.14314): the nearest of 16 quantiles of the normal distribution, of w over the absmax of its block of 64 neighbours on the
last input dim (the last block may be shorter), two codes to a byte. Codes and scales keep the weight's rank and order of dims, so
both are sharded by the weight's own row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qvlmoe_jax.lora import Quantization

BLOCK = 64
# Appendix E of the paper: quantiles of N(0,1), normalised to [-1, 1], with an exact zero.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2


def quantised_shapes(kind: Quantization, shape: Sequence[int], dims: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes (int8 or uint8) and scales (float32) of a weight with `dims` = (input dims, output dims)."""
    inputs, outputs = dims
    first, last = len(shape) - inputs - outputs, len(shape) - outputs - 1
    if kind == "int8":
        return tuple(shape), tuple(1 if first <= i <= last else size for i, size in enumerate(shape))
    K = shape[last]
    return (*shape[:last], -(-K // 2), *shape[last + 1 :]), (*shape[:last], -(-K // BLOCK), *shape[last + 1 :])


def quantised_bytes(kind: Quantization, shape: Sequence[int], dims: tuple[int, int]) -> int:
    """Bytes of codes and scales."""
    codes, scales = quantised_shapes(kind, shape, dims)
    return math.prod(codes) + 4 * math.prod(scales)


def scales_of(kind: Quantization, weight: np.ndarray, dims: tuple[int, int]) -> np.ndarray:
    """The scales of a weight, or of a part of it that holds whole input dims; float32."""
    inputs, outputs = dims
    magnitude = np.abs(np.asarray(weight, np.float32))
    last = magnitude.ndim - outputs - 1
    if kind == "int8":
        return np.max(magnitude, axis=tuple(range(last - inputs + 1, last + 1)), keepdims=True) / np.float32(127)
    return np.maximum.reduceat(magnitude, np.arange(0, magnitude.shape[last], BLOCK), axis=last)


def codes_of(kind: Quantization, weight: np.ndarray, scales: np.ndarray, dims: tuple[int, int]) -> np.ndarray:
    """The codes of a weight with these scales. A channel or block of zeros has scale 0 and reads back as zeros."""
    w = np.asarray(weight, np.float32)
    divisor = np.where(scales > 0, scales, np.float32(1))
    if kind == "int8":
        return np.rint(w / divisor).astype(np.int8)
    last = w.ndim - dims[1] - 1
    before = (slice(None),) * last
    codes = np.searchsorted(_MIDPOINTS, w / np.repeat(divisor, BLOCK, axis=last)[(*before, slice(w.shape[last]))]).astype(
        np.uint8
    )
    if w.shape[last] % 2:
        codes = np.pad(codes, [(0, int(dim == last)) for dim in range(w.ndim)])
    even, odd = (codes[(*before, slice(start, None, 2))] for start in (0, 1))
    return even | odd << 4


def dequantise(kind: Quantization, codes: np.ndarray, scales: np.ndarray, dims: tuple[int, int], size: int) -> np.ndarray:
    """The weight that the codes stand for, float32. `size` is that of the last input dim."""
    if kind == "int8":
        return codes.astype(np.float32) * scales
    last = codes.ndim - dims[1] - 1
    halves = NF4[np.stack([codes & 15, codes >> 4], axis=last + 1)]
    shape = list(codes.shape)
    shape[last] = 2 * shape[last]
    part = (slice(None),) * last + (slice(size),)
    return halves.reshape(shape)[part] * np.repeat(scales, BLOCK, axis=last)[part]
