"""Inputs in the form Hugging Face's processor returns them (numpy), for any configuration.

A row of a batch is written as a list of parts, with picture sizes in *merged* tokens, and rendered for a config: the same
list gives 2x2-merged patches for one model and unmerged ones for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Inputs = dict[str, Any]
"""Arrays under the names of HF's processor; `Any`, so that they can be passed on as keyword arguments."""


@dataclass(frozen=True)
class Text:
    length: int


@dataclass(frozen=True)
class Image:
    """`height` x `width` visual tokens; `marked` False leaves out the start and end tokens around them."""

    height: int
    width: int
    marked: bool = True


@dataclass(frozen=True)
class Video:
    """`frames` temporal patches. Each is preceded by a timestamp of `stamp` text tokens, as the processor writes them.

    `wrapped` puts one more start and end token around the whole clip, as transformers 5.x does.
    """

    frames: int
    height: int
    width: int
    stamp: int = 2
    wrapped: bool = False


Row = Sequence[Text | Image | Video]


def _render_row(config: dict[str, Any], row: Row, rng: np.random.Generator) -> Iterator[np.ndarray]:
    special = [config[k] for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")]
    image, video, start, end = ([token] for token in special)
    ordinary = np.setdiff1d(np.arange(config["text_config"]["vocab_size"]), special)
    for part in row:
        if isinstance(part, Text):
            yield rng.choice(ordinary, part.length)
        elif isinstance(part, Image):
            pads = np.array(image * (part.height * part.width))
            yield np.concatenate([start, pads, end]) if part.marked else pads
        else:
            yield np.array(start if part.wrapped else [], int)
            for _ in range(part.frames):
                yield rng.choice(ordinary, part.stamp)
                yield np.array(start + video * (part.height * part.width) + end)
            yield np.array(end if part.wrapped else [], int)


def build(config: dict[str, Any], rows: Sequence[Row], *, seed: int = 0, padding: str = "right", mask: bool = True) -> Inputs:
    """Renders rows for a config (`config.json` object).

    Returns `input_ids [B,T]`, `attention_mask [B,T]` unless `mask` is False, and as needed `pixel_values [N, C*T*p*p]` with
    `image_grid_thw [n,3]`, the same two for videos, `mm_token_type_ids [B,T]` (0 text, 1 image, 2 video).
    """
    rng = np.random.default_rng(seed)
    vision = config["vision_config"]
    merge = vision["spatial_merge_size"]
    width = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    ids = [np.concatenate([part.astype(np.int64) for part in _render_row(config, row, rng)]) for row in rows]
    length = max(map(len, ids))
    out: Inputs = {name: np.zeros((len(rows), length), np.int64) for name in ("input_ids", "attention_mask")}
    for b, row_ids in enumerate(ids):
        at = slice(length - len(row_ids), None) if padding == "left" else slice(0, len(row_ids))
        out["input_ids"][b, at] = row_ids
        out["attention_mask"][b, at] = 1
    types = 1 * (out["input_ids"] == config["image_token_id"]) + 2 * (out["input_ids"] == config["video_token_id"])
    parts = [part for row in rows for part in row]
    grids = {
        "pixel_values": ("image_grid_thw", [(1, p.height * merge, p.width * merge) for p in parts if isinstance(p, Image)]),
        "pixel_values_videos": (
            "video_grid_thw",
            [(p.frames, p.height * merge, p.width * merge) for p in parts if isinstance(p, Video)],
        ),
    }
    for pixels_key, (grid_key, grid) in grids.items():
        if grid:
            out[grid_key] = np.array(grid, np.int64)
            out[pixels_key] = rng.normal(0, 1, (int(out[grid_key].prod(1).sum()), width)).astype(np.float32)
            out["mm_token_type_ids"] = types.astype(np.int64)
    if not mask:
        assert out.pop("attention_mask").all(), "rows of different lengths need a mask"
    return out


def valid(inputs: Inputs) -> np.ndarray:
    """bool [B,T]: the positions whose logits mean something."""
    return inputs.get("attention_mask", np.ones_like(inputs["input_ids"])) != 0


def shifted_labels(inputs: Inputs, config: dict[str, Any]) -> np.ndarray:
    """Labels [B,T] as a trainer makes them: the ids, -100 on padding and on visual placeholders."""
    ids = inputs["input_ids"]
    ignored = ~valid(inputs) | (ids == config["image_token_id"]) | (ids == config["video_token_id"])
    return np.where(ignored, -100, ids)


def far_positions(inputs: Inputs, start: int = 2**17 - 24) -> Inputs:
    """The same input with explicit `position_ids [3,B,T]` around 2^17, the three axes apart and not monotonic."""
    batch, length = inputs["input_ids"].shape
    t = np.arange(length)
    axes = np.stack([t, t // 3 + 5, (7 * t) % 31])
    return inputs | {"position_ids": np.broadcast_to(start + axes[:, None], (3, batch, length)).astype(np.int64)}


CASES: dict[str, Callable[[dict[str, Any]], Inputs]] = {
    "text": lambda c: build(c, [[Text(13)], [Text(13)]], mask=False),
    "text_left_padded": lambda c: build(c, [[Text(9)], [Text(17)]], padding="left"),
    "image": lambda c: build(c, [[Text(3), Image(3, 5), Text(6)], [Text(5), Image(3, 4), Text(7)]], padding="right"),
    "smallest_image": lambda c: build(c, [[Text(2), Image(1, 1), Text(4)], [Image(1, 1), Text(6)]], mask=False),
    "thin_images": lambda c: build(c, [[Text(2), Image(1, 7), Text(4)], [Image(6, 1), Text(7)]], mask=False),
    "two_images": lambda c: build(
        c, [[Text(4), Image(2, 3), Text(3), Image(4, 2), Text(5)], [Image(3, 1), Text(2), Image(2, 5), Text(9)]]
    ),
    "adjacent_images": lambda c: build(
        c, [[Text(2), Image(2, 2), Image(3, 2), Image(1, 3), Text(5)], [Text(1), Image(2, 4), Image(2, 4), Text(8)]]
    ),
    "video": lambda c: build(c, [[Text(3), Video(3, 2, 3), Text(5)], [Text(4), Video(2, 3, 2), Text(3)]]),
    "wrapped_video": lambda c: build(
        c, [[Text(3), Video(3, 2, 3, wrapped=True), Text(5)], [Text(4), Video(1, 3, 4, wrapped=True), Text(3)]]
    ),
    "mixed": lambda c: build(
        c,
        [
            [Text(2), Video(2, 1, 3), Text(2), Image(2, 3), Text(3), Video(3, 2, 1), Text(4)],
            [Image(3, 2), Text(2), Video(2, 2, 2, wrapped=True), Image(1, 2), Text(3)],
        ],
    ),
    "touching": lambda c: build(c, [[Text(2), Image(2, 3, marked=False), Text(4)], [Image(3, 2, marked=False), Text(6)]]),
    "left_padded": lambda c: build(
        c, [[Text(2), Image(2, 2), Text(4)], [Text(5), Image(3, 4), Text(3), Image(2, 1), Text(6)]], padding="left"
    ),
    "right_padded": lambda c: build(
        c, [[Text(2), Image(2, 2), Text(4)], [Text(5), Image(3, 4), Text(3), Image(2, 1), Text(6)]], padding="right"
    ),
    "text_beside_image": lambda c: build(c, [[Text(15)], [Text(3), Image(4, 3), Text(2), Image(2, 2), Text(5)]]),
    "far_positions": lambda c: far_positions(build(c, [[Text(4), Image(3, 2), Text(12)], [Text(7), Video(2, 2, 2), Text(5)]])),
}
"""Every shape of input the model must take, by name."""
