"""Batch: everything the host knows about one forward pass, computed once, with static shapes.

B rows, T columns, G vision groups, R vision rows, P patches per row, W numbers per patch. Positions and visual indices travel
with the tokens, so no sharding of B or T can lose them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import BatchError
from qvlmoe_jax.frames import Frame, bucket, pack_frames, split_frames
from qvlmoe_jax.positions import mrope_positions

IGNORED_LABEL = -100


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A pytree of arrays (numpy on the host, jax on devices).

    Attributes:
      input_ids: `[B,T]` int32.
      position_ids: `[3,B,T]` int32, M-RoPE positions (T, H, W); 0 at padding.
      segment_ids: `[B,T]` int32, 0 = padding, documents of a packed row counted from 1.
      visual_index: `[B,T]` int32, the column's row in its group's flattened merged visual tokens, -1 = text.
      pixel_values: `[G,R,P,W]`; group g holds the frames of text rows g*B/G .. (g+1)*B/G - 1. R may be 0.
      patch_segment_ids: `[G,R,P]` int32, one number per frame, 0 = padding.
      patch_coords: `[G,R,P,2]` int32, row and column of the patch in its frame.
      pos_index, pos_weight: `[G,R,P,4]`, entries of the learned position table and their weights.
      labels: `[B,T]` int32 or None; -100 is ignored.
    """

    input_ids: Any
    position_ids: Any
    segment_ids: Any
    visual_index: Any
    pixel_values: Any
    patch_segment_ids: Any
    patch_coords: Any
    pos_index: Any
    pos_weight: Any
    labels: Any = None

    @classmethod
    def from_hf(
        cls,
        config: Qwen3VLMoeConfig,
        *,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        pixel_values_videos: Any = None,
        video_grid_thw: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        mm_token_type_ids: Any = None,
        text_length: int | None = None,
        vision_rows: int | None = None,
        row_patches: int | None = None,
        groups: int = 1,
    ) -> Batch:
        """A Batch from what HF's processor returns, numpy or torch. Token (b, t) of the input stays at (b, t).

        Args:
          input_ids: `[B,T0]`. attention_mask: `[B,T0]` of 0 and 1, padding on either side; None = no padding.
          pixel_values `[patches,W]` with image_grid_thw `[images,3]`, pixel_values_videos with video_grid_thw `[videos,3]`.
          position_ids: None computes them; otherwise `[B,T0]`, `[3,B,T0]` or `[4,B,T0]` (HF's text row is dropped).
          labels: `[B,T0]`, ids of the columns themselves, -100 where nothing is to be learnt.
          mm_token_type_ids: accepted because the processor returns it; must agree with the ids it is derived from.
          text_length, vision_rows, row_patches: T, R and P; None = the smallest that fit, rounded up to a power of two.
          groups: G; B must be a multiple of it.
        Raises:
          BatchError: placeholders and visual tokens differ (both numbers named), an id outside the vocabulary, a grid the merge
            size does not divide, a wrong pixel width, shapes that disagree, sizes too small.
        """
        ids = _host(input_ids, "input_ids", 2)
        mask = np.ones(ids.shape, bool) if attention_mask is None else _host(attention_mask, "attention_mask", 2) != 0
        B, T0 = ids.shape
        if not ids.size:
            raise BatchError(f"input_ids have shape {[B, T0]}, expected at least one row and one column")
        if mask.shape != ids.shape:
            raise BatchError(f"attention_mask has shape {list(mask.shape)}, expected input_ids' {[B, T0]}")
        vocab = config.text_config.vocab_size
        if not (0 <= ids.min() and ids.max() < vocab):
            bad = ids.max() if ids.max() >= vocab else ids.min()
            raise BatchError(f"input_ids contain {bad}, outside the vocabulary; expected 0 .. {vocab - 1}")
        if groups < 1 or B % groups:
            raise BatchError(f"groups = {groups}, expected a divisor of the {B} rows")

        media = Media.of(config, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        kinds = np.zeros(ids.shape, np.int8)
        kinds[ids == config.image_token_id] = 1
        kinds[ids == config.video_token_id] = 2
        if mm_token_type_ids is not None and np.any((_host(mm_token_type_ids, "mm_token_type_ids", 2) != kinds) & mask):
            raise BatchError("mm_token_type_ids contradict input_ids: expected 1 at image_token_id, 2 at video_token_id, else 0")
        kinds[~mask] = 0
        frames, rows_of = media.assign(kinds, mask, config.vision_config.merge_unit)

        packed = pack_frames(
            frames,
            [row * groups // B for row in rows_of],
            config.vision_config,
            groups=groups,
            rows=vision_rows,
            row_patches=row_patches,
        )
        T = bucket(T0) if text_length is None else text_length
        if T < T0:
            raise BatchError(f"text_length = {T} is too short for input_ids of {T0} columns")
        merge = config.vision_config.spatial_merge_size
        visual_index = np.full((B, T), -1, np.int32)
        positions = np.zeros((3, B, T), np.int32)
        for b in range(B):
            own = [i for i, row in enumerate(rows_of) if row == b]
            sizes = [(frames[i].height // merge, frames[i].width // merge) for i in own]
            columns = np.flatnonzero(mask[b])
            positions[:, b, columns] = mrope_positions(kinds[b, columns], sizes)
            index = [packed.first_token[i] + np.arange(h * w) for i, (h, w) in zip(own, sizes, strict=True)]
            visual_index[b, np.flatnonzero(kinds[b])] = np.concatenate(index) if index else []
        if position_ids is not None:
            positions = _pad(_given_positions(position_ids, B, T0), T, 0)
        batch = cls(
            input_ids=_pad(ids.astype(np.int32), T, 0),
            position_ids=positions,
            segment_ids=_pad(mask.astype(np.int32), T, 0),
            visual_index=visual_index,
            pixel_values=packed.pixel_values,
            patch_segment_ids=packed.patch_segment_ids,
            patch_coords=packed.patch_coords,
            pos_index=packed.pos_index,
            pos_weight=packed.pos_weight,
            labels=None if labels is None else _pad(_given_labels(labels, ids.shape, vocab), T, IGNORED_LABEL),
        )
        batch.check()
        return batch

    def check(self) -> None:
        """Shapes of all fields against each other.

        Raises:
          BatchError: names the field, its shape and the one expected.
        """
        (B, T), (G, R, P) = self.input_ids.shape, self.patch_segment_ids.shape
        expected = {
            "position_ids": (3, B, T),
            "segment_ids": (B, T),
            "visual_index": (B, T),
            "labels": (B, T),
            "pixel_values": (G, R, P, self.pixel_values.shape[-1]),
            "patch_coords": (G, R, P, 2),
            "pos_index": (G, R, P, 4),
            "pos_weight": (G, R, P, 4),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise BatchError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        if B % G:
            raise BatchError(f"{G} vision groups do not divide {B} text rows")


@dataclasses.dataclass
class Media:
    """The frames of all pictures and of all videos of the input, each list in the order HF passes them (row-major)."""

    images: list[Frame]
    videos: list[Frame]

    @classmethod
    def of(cls, config: Qwen3VLMoeConfig, pixels: Any, grids: Any, video_pixels: Any, video_grids: Any) -> Media:
        def frames(values: Any, grid: Any, values_name: str, grid_name: str) -> list[Frame]:
            if (values is None) != (grid is None):
                given, missing = (values_name, grid_name) if grid is None else (grid_name, values_name)
                raise BatchError(f"{given} came without {missing}; expected both or neither")
            if values is None:
                return []
            grid = _host(grid, grid_name, 2)
            if grid.shape[1] != 3:
                raise BatchError(f"{grid_name} has shape {list(grid.shape)}, expected [n, 3]")
            return split_frames(_host(values, values_name, 2, integer=False), grid, config.vision_config, grid_name)

        return cls(
            frames(pixels, grids, "pixel_values", "image_grid_thw"),
            frames(video_pixels, video_grids, "pixel_values_videos", "video_grid_thw"),
        )

    def assign(self, kinds: np.ndarray, mask: np.ndarray, merge_unit: int) -> tuple[list[Frame], list[int]]:
        """The frames in sequence order and the text row of each.

        Raises:
          BatchError: counts that differ, or a run of placeholders that ends inside a frame.
        """
        for kind, frames, name in ((1, self.images, "image"), (2, self.videos, "video")):
            tokens, features = int((kinds == kind).sum()), sum(f.num_patches for f in frames) // merge_unit
            if tokens != features:
                raise BatchError(
                    f"input_ids hold {tokens} {name} placeholder tokens, but the {name} grids give {features} visual tokens; "
                    "expected the same number (was the text built for other pictures, or truncated?)"
                )
        pending = {1: iter(self.images), 2: iter(self.videos)}
        ordered: list[Frame] = []
        rows: list[int] = []
        for b in range(len(kinds)):
            columns = np.flatnonzero(mask[b])
            row, at = kinds[b, columns], 0
            while len(visual := np.flatnonzero(row[at:])):
                at += int(visual[0])
                frame = next(pending[int(row[at])])
                tokens = frame.num_patches // merge_unit
                same = row[at : at + tokens] == row[at]
                if len(same) < tokens or not same.all():
                    found = len(same) if same.all() else int(np.argmin(same))
                    raise BatchError(
                        f"input_ids row {b}, column {columns[at]}: {found} placeholder tokens in a row, but the next frame "
                        f"({frame.height} x {frame.width} patches) needs {tokens}"
                    )
                ordered.append(frame)
                rows.append(b)
                at += tokens
        return ordered, rows


def _host(value: Any, name: str, *ndim: int, integer: bool = True) -> np.ndarray:
    """numpy from numpy, torch (any device or dtype) or nested lists."""
    if hasattr(value, "detach"):  # torch, without importing it
        value = value.detach().cpu()
        value = (value.float() if not integer and value.element_size() < 4 else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # numpy's own says neither which argument nor what to do
        raise BatchError(f"{name} has rows of different lengths, expected one length; pad the shorter ones") from None
    if array.ndim not in ndim:
        raise BatchError(f"{name} has {array.ndim} dims, expected {' or '.join(map(str, ndim))}")
    if integer and array.dtype.kind not in "iub":
        raise BatchError(f"{name} is {array.dtype}, expected integers")
    return array


def _pad(array: np.ndarray, length: int, value: int) -> np.ndarray:
    """Pads the last dim on the right to `length`."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])], constant_values=value)


def _given_labels(labels: Any, shape: tuple[int, ...], vocab: int) -> np.ndarray:
    given = _host(labels, "labels", 2)
    if given.shape != shape:
        raise BatchError(
            f"labels have shape {list(given.shape)}, expected input_ids' {list(shape)}; they are shifted in the loss"
        )
    wrong = given[(given != IGNORED_LABEL) & ((given < 0) | (given >= vocab))]
    if wrong.size:
        raise BatchError(
            f"labels contain {wrong[0]}, expected 0 .. {vocab - 1}, or {IGNORED_LABEL} where nothing is to be learnt"
        )
    return given.astype(np.int32)


def _given_positions(position_ids: Any, B: int, T: int) -> np.ndarray:
    positions = _host(position_ids, "position_ids", 2, 3)
    if positions.ndim == 2:
        positions = np.broadcast_to(positions, (3, *positions.shape))
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[1:]
    if positions.shape != (3, B, T):
        raise BatchError(f"position_ids have shape {list(positions.shape)}, expected [{B}, {T}], [3, {B}, {T}] or [4, {B}, {T}]")
    return positions.astype(np.int32)
