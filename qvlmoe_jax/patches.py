"""From resized uint8 pixels to the rows of `pixel_values`: rescale, normalise, cut into patches.

T frames, C channels, H W pixels, h w grid in patches, m merge size, p patch size, t temporal patch size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from qvlmoe_jax.processor_files import ImageSettings

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 2**18
"""Pixels x channels cut at a time: their float32 stay in a core's cache, and memory is touched once, by the result."""


def pixel_rows(clips: Sequence[np.ndarray], settings: ImageSettings) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[sum of T/t*h*w, C*t*p*p]` float32 of all clips, one after the other, and their grids `[clips,3]` (T/t, h, w).

    Rows go merge block by merge block, (T/t, h/m, w/m, m, m); a row is flat (C, t, p, p). An incomplete last temporal patch
    repeats the last frame, so a picture is a clip of one frame.

    Args:
      clips: `[T,H,W,C]` uint8 each, H and W multiples of m * p.
    """
    p, t = settings.patch_size, settings.temporal_patch_size
    grids = np.array([(-(-len(clip) // t), clip.shape[1] // p, clip.shape[2] // p) for clip in clips], np.int64)
    ends = grids.prod(1).cumsum()
    channels = clips[0].shape[-1]
    rows = np.empty((ends[-1], channels * t * p * p), np.float32)
    parts = np.split(rows, ends[:-1])
    subtract, divide = _affine(settings)

    def cut(chunk: tuple[np.ndarray, np.ndarray]) -> None:
        blocks, out = chunk
        values = np.ascontiguousarray(blocks).astype(np.float32)
        values -= subtract
        values /= divide
        out[...] = values.reshape(*out.shape[:2], -1, out.shape[3])  # one slot fills all t

    in_threads(cut, [chunk for clip, part in zip(clips, parts, strict=True) for chunk in _chunks(clip, part, settings)])
    return rows, grids


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item. Pillow decodes and resizes, and numpy copies and computes, without Python's lock."""
    workers = min(len(items), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    if workers < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def _affine(settings: ImageSettings) -> tuple[Any, Any]:
    """What to subtract and then to divide by: rescaling by r and normalising in one step, (x - mean / r) / (std / r).

    In float32 and in this order, as transformers' torchvision back end has it; r is 1/255.
    """
    scale = np.float32(1.0 / settings.rescale_factor if settings.do_rescale else 1.0)
    if not settings.do_normalize:
        return np.float32(0.0), scale
    both = []
    for stat in (settings.image_mean, settings.image_std):
        per_channel = np.asarray(stat, np.float32) * scale
        # one number is several times faster than a broadcast array, and the released files hold 0.5 three times
        same = per_channel.min() == per_channel.max()
        both.append(per_channel[0] if same else per_channel[:, None, None, None])
    return both[0], both[1]


def _chunks(clip: np.ndarray, rows: np.ndarray, settings: ImageSettings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of a clip's pixels `[bands,w/m,m,m,C,slots,p,p]` beside views of their rows `[bands*w/m*m*m,C,t,p*p]`.

    A band is one row of merge blocks. slots is t, or 1 for a picture.
    """
    m, p, t = settings.merge_size, settings.patch_size, settings.temporal_patch_size
    T, H, W, C = clip.shape
    if T > 1 and T % t:
        clip = np.concatenate([clip, np.repeat(clip[-1:], -T % t, axis=0)])
    steps, slots = (1, 1) if T == 1 else (len(clip) // t, t)
    bands, columns = H // (m * p), W // (m * p)
    source = clip.reshape(steps, slots, bands, m, p, columns, m, p, C).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    target = rows.reshape(steps, bands, columns * m * m, C, t, p * p)
    size = max(1, _CHUNK // (slots * m * p * W * C))
    for step in range(steps):
        for band in range(0, bands, size):
            yield source[step, band : band + size], target[step, band : band + size].reshape(-1, C, t, p * p)
