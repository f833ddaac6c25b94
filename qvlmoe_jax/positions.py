"""M-RoPE position ids on the host (MOE 1047-1150). numpy only."""

from __future__ import annotations

import numpy as np


def mrope_positions(kinds: np.ndarray, frame_sizes: list[tuple[int, int]]) -> np.ndarray:
    """Temporal, height and width positions `[3,n]` of one unpadded sequence.

    Text counts up on all three axes. A frame that begins at `cur` gets T = cur, H = cur + row, W = cur + column over its merged
    tokens; the next token continues at `cur + max(height, width)`.

    Args:
      kinds: `[n]`, 0 for text, otherwise any other number for a visual token.
      frame_sizes: merged (height, width) of the frames in the order their tokens appear; their areas add up to the visual tokens.
    """
    positions = np.empty((3, len(kinds)), np.int32)
    visual = kinds != 0
    current, at = 0, 0
    frames = iter(frame_sizes)
    while at < len(kinds):
        if visual[at]:
            height, width = next(frames)
            end = at + height * width
            rows, cols = np.divmod(np.arange(height * width, dtype=np.int32), width)
            positions[:, at:end] = current + np.stack([np.zeros_like(rows), rows, cols])
            current += max(height, width)
        else:
            following = np.flatnonzero(visual[at:])
            end = at + int(following[0]) if len(following) else len(kinds)
            positions[:, at:end] = current + np.arange(end - at, dtype=np.int32)
            current += end - at
        at = end
    return positions
