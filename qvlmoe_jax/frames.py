"""Frames of pictures and videos on the host: their coordinates, their position-table taps, and packing them into rows.

A frame is one time step of one picture or video: an attention segment of `height x width` patches, in merge-block-major order.
numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeVisionConfig
from qvlmoe_jax.errors import BatchError


@dataclass(frozen=True)
class Frame:
    """`patches [height*width, W]`, rows merge-block-major, and the frame's size in patches."""

    patches: np.ndarray
    height: int
    width: int

    @property
    def num_patches(self) -> int:
        return self.height * self.width


def block_coordinates(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column `[height*width]` of each patch in merge-block-major order (VU 104-141)."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    grid = grid.reshape(2, height // merge, merge, width // merge, merge).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return grid[0].astype(np.int32), grid[1].astype(np.int32)


def position_table_taps(rows: np.ndarray, cols: np.ndarray, height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The 4 entries of the `side x side` position table that a patch mixes, bilinear with align_corners=True (VU 186-300).

    Args:
      rows, cols: `[n]` patch coordinates in a frame of `height x width` patches.
    Returns:
      index `[n,4]` int32 into the flattened table and weight `[n,4]` float32.
    """

    def axis(index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(source)
        taps = np.minimum(low.astype(np.int32)[:, None] + np.arange(2, dtype=np.int32), side - 1)
        distance = np.abs(source[:, None] - low[:, None] - np.arange(2, dtype=np.float32))
        return taps, np.maximum(np.float32(1) - distance, np.float32(0))

    row_taps, row_weights = axis(rows, height)
    col_taps, col_weights = axis(cols, width)
    index = (row_taps[:, :, None] * side + col_taps[:, None, :]).reshape(-1, 4)
    return index, (row_weights[:, :, None] * col_weights[:, None, :]).reshape(-1, 4)


def split_frames(pixel_values: np.ndarray, grid_thw: np.ndarray, config: Qwen3VLMoeVisionConfig, name: str) -> list[Frame]:
    """Cuts HF's flat `pixel_values [sum t*h*w, W]` into frames, in order.

    Args:
      name: HF's name of the grid argument, for the messages.
    Raises:
      BatchError: a grid that the merge size does not divide, a wrong patch width, or a row count the grids do not add up to.
    """
    merge = config.spatial_merge_size
    for i, (t, h, w) in enumerate(grid_thw.tolist()):
        if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
            raise BatchError(
                f"{name}[{i}] = [{t}, {h}, {w}], expected positive sizes, height and width divisible by "
                f"spatial_merge_size = {merge}"
            )
    if pixel_values.ndim != 2 or pixel_values.shape[1] != config.patch_width:
        raise BatchError(
            f"pixel values for {name} have shape {list(pixel_values.shape)}, expected [patches, {config.patch_width}] "
            f"(in_channels {config.in_channels} x temporal_patch_size {config.temporal_patch_size} x "
            f"patch_size {config.patch_size}^2)"
        )
    total = int(grid_thw.prod(axis=1).sum())
    if total != pixel_values.shape[0]:
        raise BatchError(f"{name} describes {total} patches, but its pixel values hold {pixel_values.shape[0]}")
    frames, start = [], 0
    for t, h, w in grid_thw.tolist():
        for _ in range(t):
            frames.append(Frame(pixel_values[start : start + h * w], h, w))
            start += h * w
    return frames


def place_frames(sizes: list[int], row_patches: int) -> tuple[list[tuple[int, int]], int]:
    """First-fit decreasing: `(row, first patch)` of each frame and the rows used; a frame never crosses a row.

    Within a row frames keep their order: attention skips blocks by the smallest and largest frame number they hold.
    """
    free: list[int] = []
    row_of = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row_of[i] = next((r for r, left in enumerate(free) if left >= sizes[i]), len(free))
        if row_of[i] == len(free):
            free.append(row_patches)
        free[row_of[i]] -= sizes[i]
    ends = [0] * len(free)
    places = []
    for row, size in zip(row_of, sizes, strict=True):
        places.append((row, ends[row]))
        ends[row] += size
    return places, len(free)


def bucket(count: int, unit: int = 1) -> int:
    """The smallest `unit * 2**n` that holds `count`; 0 for 0."""
    return unit << (max(0, -(-count // unit) - 1).bit_length()) if count else 0


@dataclass(frozen=True)
class PackedFrames:
    """The vision half of a Batch, `[G,R,P,...]`, and where each frame's first merged token landed in its group (`[frames]`)."""

    pixel_values: np.ndarray
    patch_segment_ids: np.ndarray
    patch_coords: np.ndarray
    pos_index: np.ndarray
    pos_weight: np.ndarray
    first_token: np.ndarray


def pack_frames(
    frames: list[Frame],
    group_of: list[int],
    config: Qwen3VLMoeVisionConfig,
    *,
    groups: int,
    rows: int | None,
    row_patches: int | None,
) -> PackedFrames:
    """Packs frames into `groups` groups of `rows` rows of `row_patches` patches; None sizes are the smallest power-of-two fit.

    Raises:
      BatchError: the sizes asked for are too small, or `row_patches` is not a multiple of merge^2; says what would fit.
    """
    unit = config.merge_unit
    largest = max((f.num_patches for f in frames), default=0)
    P = bucket(max(largest, unit), unit) if row_patches is None else row_patches
    if P % unit or P < largest:
        raise BatchError(
            f"row_patches = {P}, expected a multiple of {unit} (spatial_merge_size^2), at least {largest} (the largest frame)"
        )
    places: list[tuple[int, int]] = [(0, 0)] * len(frames)
    used = 0
    for g in range(groups):
        members = [i for i, group in enumerate(group_of) if group == g]
        placed, group_rows = place_frames([frames[i].num_patches for i in members], P)
        used = max(used, group_rows)
        for i, place in zip(members, placed, strict=True):
            places[i] = place
    R = bucket(used) if rows is None else rows
    if R < used:
        raise BatchError(f"vision_rows = {R} rows of {P} patches are too few: these pictures need {used}")

    shape = (groups, R, P)
    out = PackedFrames(
        pixel_values=np.zeros((*shape, config.patch_width), np.float32),
        patch_segment_ids=np.zeros(shape, np.int32),
        patch_coords=np.zeros((*shape, 2), np.int32),
        pos_index=np.zeros((*shape, 4), np.int32),
        pos_weight=np.zeros((*shape, 4), np.float32),
        first_token=np.zeros(len(frames), np.int32),
    )
    geometry: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
    for i, (frame, g, (row, start)) in enumerate(zip(frames, group_of, places, strict=True)):
        size = (frame.height, frame.width)
        if size not in geometry:
            coords = block_coordinates(*size, config.spatial_merge_size)
            geometry[size] = (np.stack(coords, axis=-1), *position_table_taps(*coords, *size, config.num_grid_per_side))
        at = (g, row, slice(start, start + frame.num_patches))
        out.pixel_values[at] = frame.patches
        out.patch_segment_ids[at] = i + 1
        out.patch_coords[at], out.pos_index[at], out.pos_weight[at] = geometry[size]
        out.first_token[i] = (row * P + start) // unit
    return out
