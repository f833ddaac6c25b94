"""Block-scaled float8 checkpoints: `X` is float8_e4m3fn, `X_scale_inv` holds one float32 per block of its last two dims.

`value = X.float32 * scale of its block`, in float32, then rounded once to the dtype asked for. Blocks at the edge may be ragged.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qvlmoe_jax.hf import Row

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor `[..., rows, columns]`: one per block, ragged ones included."""
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def split_ranges(row: Row) -> list[tuple[int, int]]:
    """For each dim of the tensor on disk, the range of `row.split` that it became.

    Raises:
      ValueError: the row merges dims instead (the patch convolution), so blocks of them have no meaning in the parameter.
    """
    ranges, start = [], 0
    for size in row.hf_shape:
        stop, product = start, 1
        while stop == start or product < size:
            if stop == len(row.split):
                raise ValueError(f"{row.key!r} {row.hf_shape} is no refinement into {row.split}")
            product *= row.split[stop]
            stop += 1
        if product != size:
            raise ValueError(f"{row.key!r} {row.hf_shape} is no refinement into {row.split}")
        ranges.append((start, stop))
        start = stop
    return ranges


def dequantise(row: Row, weight: np.ndarray, scale: np.ndarray, block: tuple[int, int], inner: tuple[slice, ...]) -> np.ndarray:
    """`row.to_param(weight.float32 * scale repeated over its blocks)[inner]`, computing that part only.

    Args:
      row: the tensor's place in the parameters; it says how the tensor's dims are split and permuted.
      weight: the tensor on disk, float8.
      scale: `scale_shape(weight.shape, block)`.
      inner: one slice per axis of `row.shape`.
    Returns:
      float32.
    """
    blocks = (1,) * (len(row.hf_shape) - 2) + block
    index = []
    for dim, (first, stop) in enumerate(split_ranges(row)):
        which = np.arange(row.hf_shape[dim]) // blocks[dim]
        which = which.reshape([size if first <= i < stop else 1 for i, size in enumerate(row.split)]).transpose(row.axes)
        index.append(which[tuple(part if size > 1 else slice(None) for part, size in zip(inner, which.shape, strict=True))])
    return row.to_param(weight)[inner].astype(np.float32) * scale[tuple(index)].astype(np.float32)
