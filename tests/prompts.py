"""Prompts for generation: single rows, and batches of conversations put together from them, padded on the left as HF needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.cases import Image, Inputs, Row, Text, Video, build

ROWS: dict[str, Row] = {
    "text": [Text(13)],
    "long text": [Text(29)],
    "one token": [Text(1)],
    "image": [Text(3), Image(3, 5), Text(6)],
    "image first": [Image(4, 3), Text(7)],
    "image last": [Text(5), Image(2, 4)],
    "two images": [Text(4), Image(2, 3), Text(3), Image(4, 2), Text(5)],
    "adjacent images": [Text(2), Image(2, 2), Image(3, 2), Image(1, 3), Text(5)],
    "video": [Text(3), Video(3, 2, 3), Text(5)],
    "wrapped video": [Text(3), Video(2, 3, 2, wrapped=True), Text(4)],
    "mixed": [Text(2), Video(2, 1, 3), Text(2), Image(2, 3), Text(3), Video(3, 2, 1), Text(4)],
}
"""One row each, by name."""


def row(config: dict[str, Any], name: str, seed: int = 0) -> Inputs:
    """One of `ROWS`, rendered."""
    return build(config, [ROWS[name]], seed=seed)


def batch(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Inputs:
    """Conversations, each a list of single-row inputs one after the other, as one left-padded batch."""
    ids = [np.concatenate([part["input_ids"][0] for part in parts]) for parts in conversations]
    length = max(map(len, ids))
    out: Inputs = {name: np.zeros((len(ids), length), np.int64) for name in ("input_ids", "attention_mask")}
    for b, one in enumerate(ids):
        out["input_ids"][b, length - len(one) :] = one
        out["attention_mask"][b, length - len(one) :] = 1
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        arrays = [part[key] for parts in conversations for part in parts if key in part]
        if arrays:
            out[key] = np.concatenate(arrays)
    if any(key in out for key in ("pixel_values", "pixel_values_videos")):
        types = [np.concatenate([part.get("mm_token_type_ids", part["input_ids"] * 0)[0] for part in p]) for p in conversations]
        out["mm_token_type_ids"] = np.stack([np.pad(t, (length - len(t), 0)) for t in types])
    return out


def plain(ids: Any) -> Inputs:
    """Ids as a single-row input (an answer, to go on from)."""
    return {"input_ids": np.asarray(ids, np.int64)[None]}
