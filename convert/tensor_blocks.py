"""A tensor of the table, read from any kind of directory in blocks of bounded size, in the order of its bytes on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from qvlmoe_jax.checkpoint import Weights
from qvlmoe_jax.fast_copy import copy_into
from qvlmoe_jax.hf import Row

BLOCK_BYTES = 4 << 20


def block_reads(weights: Weights, row: Row, dtype: np.dtype) -> Iterator[Callable[[], np.ndarray]]:
    """Reads to be done, in any thread: their arrays' bytes, one after another, are the tensor `row.key` as the hub has it.

    Args:
      dtype: of the arrays, which are contiguous and of some `BLOCK_BYTES`.
    """
    outer = row.split[0]
    row_bytes = max(1, int(np.prod(row.split[1:], dtype=np.int64)) * dtype.itemsize)
    # a power of two, as what our files hold: blocks do not cross them
    step = 1 << (max(1, BLOCK_BYTES // row_bytes).bit_length() - 1)
    for start in range(0, outer, step):
        yield functools.partial(_read, weights, row, dtype, start, min(start + step, outer))


def _read(weights: Weights, row: Row, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    index = row.hf_rows(start, stop)
    slices = tuple(at if isinstance(at, slice) else slice(at, at + 1) for at in index)
    part = weights.read(row.path, slices, dtype, copy=False)
    # to_hf for this run of the outermost dim
    shape = tuple(stop - start if axis == 0 else row.split[axis] for axis in row.axes)
    turned = part.reshape(shape).transpose(np.argsort(row.axes))
    if turned.flags.c_contiguous:
        return turned
    block = np.empty(turned.shape, dtype)
    copy_into(block, turned)
    return block


def tensor_blocks(weights: Weights, row: Row, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The arrays of `block_reads`, one at a time."""
    return (read() for read in block_reads(weights, row, dtype))
