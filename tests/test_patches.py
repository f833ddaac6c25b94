"""`pixel_rows` against transformers' own reshape and permute, for any sizes and however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlmoe_jax import patches
from qvlmoe_jax.processor_files import ImageSettings


def expected_rows(clip: np.ndarray, p: int, m: int, t: int) -> np.ndarray:
    """`Qwen3VLVideoProcessor.patchify` and `rescale_and_normalize`, in numpy."""
    clip = np.concatenate([clip, np.repeat(clip[-1:], -len(clip) % t, axis=0)])
    values = (clip.transpose(0, 3, 1, 2).astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    T, C, H, W = values.shape
    h, w = H // p, W // p
    blocks = values.reshape(T // t, t, C, h // m, m, p, w // m, m, p)
    return blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(T // t * h * w, C * t * p * p)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    p=st.integers(1, 5),
    m=st.integers(1, 3),
    t=st.integers(1, 3),
    chunk=st.sampled_from([1, 300, 2**18]),
)
def test_rows_of_any_clips(shapes: list[tuple[int, int, int]], p: int, m: int, t: int, chunk: int) -> None:
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (T, h * m * p, w * m * p, 3), np.uint8) for T, h, w in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "_CHUNK", chunk)
        rows, grids = patches.pixel_rows(clips, ImageSettings(patch_size=p, merge_size=m, temporal_patch_size=t))
    np.testing.assert_array_equal(rows, np.concatenate([expected_rows(clip, p, m, t) for clip in clips]))
    assert grids.tolist() == [[-(-T // t), h * m, w * m] for T, h, w in shapes]
