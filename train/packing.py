"""Documents into batches of one fixed shape: first-fit on text tokens and on visual patches at once.

A microbatches, B text rows of T tokens, G vision groups of R rows of P patches, W numbers per patch. A document goes into the
first text row with room for its tokens whose vision group has room for each of its frames; it is never cut, and neither is a
frame. What fits nowhere waits for the next batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qvlmoe_jax.batch import IGNORED_LABEL, Batch
from qvlmoe_jax.config import Qwen3VLMoeVisionConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.frames import block_coordinates, position_table_taps
from train.data_config import DataConfig
from train.documents import Document


@dataclass(frozen=True)
class _Place:
    """Text row (a, b) from column `column` on, and `(r, first patch)` of each frame in the row's group."""

    a: int
    b: int
    column: int
    segment: int
    frames: list[tuple[int, int]]


class Packer:
    """Fills one batch after another: `add` until it says no, then `finish`. Either way of making one raises ConfigError where
    this machine has no memory for batches of that size."""

    def __init__(self, config: DataConfig, vision: Qwen3VLMoeVisionConfig):
        self._config, self._vision = config, vision
        self._A, self._B, self._T = config.accumulation, config.batch_rows, config.sequence_length
        self._G, self._R, self._P = config.num_groups(1), config.vision_rows, config.row_patches
        with self._memory():
            self._clear()

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        """Arrays that are too large are an error of the sizes in the config."""
        try:
            yield
        except (MemoryError, ValueError, OverflowError):  # the latter two: more bytes than an address can count
            sizes = ("accumulation", "batch_rows", "sequence_length", "vision_rows", "row_patches")
            named = ", ".join(f"{name} = {getattr(self._config, name)}" for name in sizes)
            raise ConfigError(f"no memory for a vision group's batch of {named}; expected smaller sizes") from None

    def _clear(self) -> None:
        self._free_tokens = np.full((self._A, self._B), self._T)
        self._free_patches = np.full((self._A, self._G, self._R), self._P)
        self._segments = np.zeros((self._A, self._B), np.int32)
        self._placed: list[tuple[Document, _Place]] = []

    @property
    def empty(self) -> bool:
        return not self._placed

    @property
    def full(self) -> bool:
        """No row can take another token."""
        return not self._free_tokens.any()

    def add(self, document: Document) -> bool:
        """Places the document if it fits."""
        place = self._find(len(document["input_ids"]), document["frame_sizes"].prod(axis=1).tolist())
        if place is None:
            return False
        self._free_tokens[place.a, place.b] -= len(document["input_ids"])
        self._segments[place.a, place.b] += 1
        group = self._group(place.b)
        for (row, _), (height, width) in zip(place.frames, document["frame_sizes"].tolist(), strict=True):
            self._free_patches[place.a, group, row] -= height * width
        self._placed.append((document, place))
        return True

    def _group(self, b: int) -> int:
        return b * self._G // self._B

    def _find(self, tokens: int, frames: list[int]) -> _Place | None:
        refused = set()  # groups without room for these frames, whatever their text rows hold
        for a, b in np.argwhere(self._free_tokens >= tokens).tolist():
            group = (a, self._group(b))
            if group in refused:
                continue
            where = self._fit_frames(self._free_patches[group], frames)
            if where is not None:
                return _Place(a, b, self._T - int(self._free_tokens[a, b]), int(self._segments[a, b]) + 1, where)
            refused.add(group)
        return None

    def _fit_frames(self, free_R: np.ndarray, frames: list[int]) -> list[tuple[int, int]] | None:
        """`(row, first patch)` of each frame, first-fit decreasing, or None."""
        if sum(frames) > free_R.sum():
            return None
        free_R = free_R.copy()
        where: list[tuple[int, int]] = [(0, 0)] * len(frames)
        for i in sorted(range(len(frames)), key=lambda i: -frames[i]):
            rows = np.flatnonzero(free_R >= frames[i])
            if not len(rows):
                return None
            where[i] = (int(rows[0]), self._P - int(free_R[rows[0]]))
            free_R[rows[0]] -= frames[i]
        return where

    def finish(self) -> Batch:
        """The batch of what was added, every array with a leading A, and an empty packer again.

        Raises:
          ConfigError: this machine has no memory for a batch of that size.
        """
        with self._memory():
            batch = self._blank()
        for document, place in self._placed:
            self._write(batch, document, place)
        self._clear()
        return batch

    def _blank(self) -> Batch:
        """A batch without documents."""
        A, B, T = self._A, self._B, self._T
        vision_shape = (A, self._G, self._R, self._P)
        return Batch(
            input_ids=np.zeros((A, B, T), np.int32),
            position_ids=np.zeros((A, 3, B, T), np.int32),
            segment_ids=np.zeros((A, B, T), np.int32),
            visual_index=np.full((A, B, T), -1, np.int32),
            pixel_values=np.zeros((*vision_shape, self._vision.patch_width), np.float32),
            patch_segment_ids=np.zeros(vision_shape, np.int32),
            patch_coords=np.zeros((*vision_shape, 2), np.int32),
            pos_index=np.zeros((*vision_shape, 4), np.int32),
            pos_weight=np.zeros((*vision_shape, 4), np.float32),
            labels=np.full((A, B, T), IGNORED_LABEL, np.int32),
        )

    def _write(self, batch: Batch, document: Document, place: _Place) -> None:
        a, b, group = place.a, place.b, self._group(place.b)
        columns = slice(place.column, place.column + len(document["input_ids"]))
        batch.input_ids[a, b, columns] = document["input_ids"]
        batch.position_ids[a, :, b, columns] = document["position_ids"]
        batch.segment_ids[a, b, columns] = place.segment
        # The first token of a document is predicted by nothing of its own: without this, by the document before it.
        batch.labels[a, b, columns] = document["labels"]
        batch.labels[a, b, place.column] = IGNORED_LABEL
        unit, side = self._vision.merge_unit, self._vision.num_grid_per_side
        start, index = 0, []
        for (row, first), (height, width) in zip(place.frames, document["frame_sizes"].tolist(), strict=True):
            count = height * width
            at = (a, group, row, slice(first, first + count))
            batch.pixel_values[at] = document["pixel_values"][start : start + count]
            batch.patch_segment_ids[at] = first + 1  # where it begins: a number no other frame of the row has
            batch.patch_coords[at], batch.pos_index[at], batch.pos_weight[at] = _geometry(
                height, width, self._vision.spatial_merge_size, side
            )
            index.append((row * self._P + first) // unit + np.arange(count // unit))
            start += count
        if index:
            batch.visual_index[a, b, columns][document["visual"]] = np.concatenate(index)


@functools.lru_cache(maxsize=256)
def _geometry(height: int, width: int, merge: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates, position-table entries and their weights of a frame's patches."""
    rows, cols = block_coordinates(height, width, merge)
    return np.stack([rows, cols], axis=-1), *position_table_taps(rows, cols, height, width, side)
