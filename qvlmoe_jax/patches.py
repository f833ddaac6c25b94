"""From resized uint8 pixels to the rows of `pixel_values`: rescale, normalise, cut into patches. Whole arrays at a time.

T frames, C channels, h w grid in patches, m merge size, p patch size, t temporal patch size.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def normalise(
    pixels: np.ndarray,
    *,
    rescale_factor: float | None,
    mean: Any = None,
    std: Any = None,
) -> np.ndarray:
    """float32 of `pixels` `[...,C,p,p]`. None leaves a step out.

    Both steps in one, as transformers' torchvision back end has it: (x - mean / r) / (std / r), each in float32.
    """
    values = pixels.astype(np.float32)
    if mean is not None:
        scale = 1.0 if rescale_factor is None else 1.0 / rescale_factor
        for stat, step in ((mean, np.subtract), (std, np.divide)):
            per_channel = np.asarray(stat, np.float32) * np.float32(scale)
            # one number is several times faster than a broadcast array, and the released files hold 0.5 three times
            same = per_channel.min() == per_channel.max()
            step(values, per_channel.flat[0] if same else per_channel[:, None, None], out=values)
    elif rescale_factor is not None:
        values *= np.float32(rescale_factor)
    return values


def patchify(frames: np.ndarray, *, patch: int, merge: int, temporal: int, **normalisation: Any) -> tuple[np.ndarray, tuple]:
    """Rows `[T/t * h * w, C*t*p*p]` float32 and the grid (T/t, h, w).

    Rows go merge block by merge block, (T/t, h/m, w/m, m, m); a row is flat (C, t, p, p). An incomplete last temporal patch
    repeats the last frame, so a picture is a clip of one frame repeated.

    Args:
      frames: `[T,H,W,C]` uint8, H and W multiples of `patch * merge`.
      normalisation: as `normalise` takes it.
    """
    T, H, W, C = frames.shape
    h, w = H // patch, W // patch
    blocks = frames.reshape(T, h // merge, merge, patch, w // merge, merge, patch, C)
    blocks = normalise(np.ascontiguousarray(blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)), **normalisation)  # T h/m w/m m m C p p
    steps = -(-T // temporal)
    rows = np.empty((steps, h * w, C, temporal, patch, patch), np.float32)
    blocks = blocks.reshape(T, h * w, C, patch, patch)
    for k in range(temporal):
        chosen = np.minimum(np.arange(steps) * temporal + k, T - 1)
        rows[:, :, :, k] = blocks[k::temporal] if k + (steps - 1) * temporal < T else blocks[chosen]
    return rows.reshape(steps * h * w, -1), (steps, h, w)
