"""Batch.from_hf: where everything lands, what is refused, and that buckets change nothing."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlmoe_jax import Batch, Qwen3VLMoeConfig
from qvlmoe_jax.errors import BatchError
from qvlmoe_jax.frames import block_coordinates, bucket, place_frames
from tests import cases, ours, tiny, tolerances
from tests.cases import Image, Text, Video
from tests.hf_checkpoints import random_hf_tensors

CONFIG = Qwen3VLMoeConfig.from_hf(tiny.TINY)
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id


def _inputs(*rows: cases.Row, **options: Any) -> cases.Inputs:
    return cases.build(tiny.TINY, list(rows), **options)


def _refused(message: str, inputs: dict[str, Any], **changes: Any) -> None:
    with pytest.raises(BatchError, match=message) as caught:
        Batch.from_hf(CONFIG, **(inputs | changes))
    assert "\n" not in str(caught.value)


def test_the_example_of_the_reference() -> None:
    """3 text tokens, vision_start, a 6 x 10 grid, vision_end: T = 0 1 2 3 | 4 x15 | 9, H = 4 5 6 by rows, W = 4..8, delta -10."""
    inputs = _inputs([Text(3), Image(3, 5), Text(1)])
    batch = Batch.from_hf(CONFIG, **inputs)
    t, h, w = batch.position_ids[:, 0, :21]
    assert t.tolist() == [0, 1, 2, 3] + [4] * 15 + [9, 10]
    assert h[4:19].tolist() == [4] * 5 + [5] * 5 + [6] * 5
    assert w[4:19].tolist() == [4, 5, 6, 7, 8] * 3
    assert batch.position_ids.max() + 1 - 21 == -10


def test_tokens_stay_where_they_are_on_either_side() -> None:
    for padding in ("left", "right"):
        inputs = _inputs([Text(3), Image(2, 2), Text(4)], [Text(5)], padding=padding)
        batch = Batch.from_hf(CONFIG, **inputs)
        T0 = inputs["input_ids"].shape[1]
        assert batch.input_ids.shape[1] == bucket(T0)
        assert np.array_equal(batch.input_ids[:, :T0], inputs["input_ids"])
        assert np.array_equal(batch.segment_ids[:, :T0], inputs["attention_mask"]) and not batch.segment_ids[:, T0:].any()
        assert not batch.position_ids[:, batch.segment_ids == 0].any()
        assert np.array_equal(batch.visual_index[:, :T0] >= 0, inputs["input_ids"] == IMAGE)


@pytest.mark.parametrize("groups", [1, 2])
def test_each_placeholder_finds_its_own_patches(groups: int) -> None:
    """Mark every patch with its number in the input; the columns must read them back in order, whatever row they went to."""
    row = [Text(1), Image(2, 3), Video(2, 2, 2), Image(1, 1), Text(2)]
    inputs = _inputs(row, [Text(4)], [Image(3, 3)], row)
    images, videos = inputs["pixel_values"], inputs["pixel_values_videos"]
    images[:] = np.arange(len(images))[:, None]
    videos[:] = 1000 + np.arange(len(videos))[:, None]
    batch = Batch.from_hf(CONFIG, **inputs, groups=groups)
    unit = CONFIG.vision_config.merge_unit
    for kind, first in ((IMAGE, 0), (VIDEO, 1000)):
        expected = first
        for b, t in np.argwhere(batch.input_ids == kind):
            patches = batch.pixel_values[b * groups // 4].reshape(-1, unit, images.shape[1])[batch.visual_index[b, t]]
            assert patches[:, 0].tolist() == list(range(expected, expected + unit))
            expected += unit


def test_frames_are_segments_in_merge_order() -> None:
    batch = Batch.from_hf(CONFIG, **_inputs([Video(3, 2, 2), Image(1, 2)]))
    ids = batch.patch_segment_ids
    assert sorted(np.unique(ids).tolist()) == [0, 1, 2, 3, 4]
    assert [int((ids == i).sum()) for i in (1, 2, 3, 4)] == [16, 16, 16, 8]
    rows, cols = block_coordinates(4, 4, 2)
    assert rows.tolist()[:8] == [0, 0, 1, 1, 0, 0, 1, 1] and cols.tolist()[:8] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert np.array_equal(batch.patch_coords[ids == 2], np.stack([rows, cols], 1))
    assert np.allclose(batch.pos_weight[ids > 0].sum(-1), 1) and not batch.pos_weight[ids == 0].any()


def test_labels_are_ids_of_their_own_columns() -> None:
    inputs = _inputs([Text(3)])
    vocab = CONFIG.text_config.vocab_size
    given = np.array([[-100, vocab - 1, -100]])
    assert Batch.from_hf(CONFIG, **inputs, labels=given).labels[0, :3].tolist() == given[0].tolist()
    _refused(re.escape("labels have shape [1, 2], expected input_ids' [1, 3]"), inputs, labels=given[:, :2])
    _refused(re.escape("labels have shape [1, 4], expected"), inputs, labels=np.full((1, 4), -100))
    for wrong in (vocab, -1, -101):
        _refused(f"labels contain {wrong}, expected 0 .. {vocab - 1}", inputs, labels=np.where(given < 0, given, wrong))


@given(sizes=st.lists(st.integers(1, 64), max_size=40), row=st.integers(64, 200))
def test_placing_frames_loses_none_and_overlaps_none(sizes: list[int], row: int) -> None:
    places, rows = place_frames(sizes, row)
    taken = np.zeros((rows, row), int)
    for size, (r, start) in zip(sizes, places, strict=True):
        taken[r, start : start + size] += 1
        assert start + size <= row
    assert taken.max(initial=0) <= 1 and taken.sum() == sum(sizes)
    assert rows <= 2 * -(-sum(sizes) // row) + 1  # first-fit never wastes half


@pytest.fixture(scope="module")
def model():
    return ours.build_model(tiny.TINY, random_hf_tensors(tiny.TINY))


def test_buckets_change_no_valid_logit(model) -> None:
    inputs = _inputs([Text(3), Image(2, 3), Text(4), Image(1, 2)], [Text(9), Video(2, 1, 2)], padding="left")
    valid = cases.valid(inputs)
    tight = Batch.from_hf(CONFIG, **inputs, text_length=valid.shape[1], vision_rows=3, row_patches=24)
    expected = np.asarray(ours.forward(model, tight))[:, : valid.shape[1]][valid]
    for sizes in ({"text_length": 100, "vision_rows": 7, "row_patches": 40}, {"text_length": 64, "row_patches": 128}):
        found = np.asarray(ours.forward(model, Batch.from_hf(CONFIG, **inputs, **sizes)))[:, : valid.shape[1]][valid]
        assert np.abs(found - expected).max() <= tolerances.BUCKETING, sizes


def test_an_all_padding_vision_input_is_no_vision_input(model) -> None:
    inputs = _inputs([Text(9)], [Text(9)])
    with_room = Batch.from_hf(CONFIG, **inputs, vision_rows=2, row_patches=16)
    assert with_room.pixel_values.shape[1:3] == (2, 16)
    a, b = (np.asarray(ours.forward(model, batch))[:, :9] for batch in (with_room, Batch.from_hf(CONFIG, **inputs)))
    assert np.abs(a - b).max() <= tolerances.BUCKETING
    # ... and the tower is skipped at run time, not multiplied by zero: NaN pixels cannot reach anything
    poisoned = dataclasses.replace(with_room, pixel_values=np.full_like(with_room.pixel_values, np.nan))
    assert np.array_equal(np.asarray(ours.forward(model, poisoned))[:, :9], a)


def test_one_bucket_compiles_once(model) -> None:
    traces = 0

    @jax.jit
    def forward(model, batch):
        nonlocal traces
        traces += 1
        return model(batch).logits

    for inputs in (_inputs([Text(20), Image(2, 2)]), _inputs([Image(1, 2), Text(17)]), _inputs([Text(4), Image(2, 2), Text(19)])):
        forward(model, Batch.from_hf(CONFIG, **inputs, row_patches=16))
    assert traces == 1


def test_torch_tensors_and_lists_are_taken_alike() -> None:
    torch = pytest.importorskip("torch")
    inputs = _inputs([Text(3), Image(2, 2), Text(4)])
    expected = Batch.from_hf(CONFIG, **inputs, labels=inputs["input_ids"])
    as_torch = {k: torch.from_numpy(v) for k, v in inputs.items()}
    as_lists = {k: v.tolist() for k, v in inputs.items()}
    for given_inputs in (as_torch, as_lists):
        found = Batch.from_hf(CONFIG, **given_inputs, labels=given_inputs["input_ids"])
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    # bfloat16 has no numpy counterpart in torch
    found = Batch.from_hf(CONFIG, **as_torch | {"pixel_values": as_torch["pixel_values"].bfloat16()})
    np.testing.assert_allclose(found.pixel_values, expected.pixel_values, rtol=1e-2)


def test_position_ids_of_every_rank() -> None:
    inputs = _inputs([Text(6)], [Text(6)])
    two = np.arange(12).reshape(2, 6)
    three = np.stack([two, two + 1, two + 2])
    four = np.concatenate([two[None] + 9, three])
    for position_ids, expected in ((two, np.stack([two] * 3)), (three, three), (four, three)):
        batch = Batch.from_hf(CONFIG, **inputs, position_ids=position_ids)
        assert np.array_equal(batch.position_ids[:, :, :6], expected)
    _refused(
        r"position_ids have shape \[5, 2, 6\], expected \[2, 6\], \[3, 2, 6\] or \[4, 2, 6\]",
        inputs,
        position_ids=np.zeros((5, 2, 6), int),
    )
    _refused("position_ids is float64, expected integers", inputs, position_ids=two + 0.5)


def test_count_mismatch_names_both_counts() -> None:
    inputs = _inputs([Text(3), Image(2, 3), Text(4)])
    ids = inputs["input_ids"].copy()
    ids[0, np.flatnonzero(ids[0] == IMAGE)[0]] = 1
    message = "input_ids hold 5 image placeholder tokens, but the image grids give 6 visual tokens"
    _refused(message, inputs, input_ids=ids, mm_token_type_ids=None)
    _refused("hold 6 image placeholder tokens, but the image grids give 0", {"input_ids": inputs["input_ids"]})
    videos = _inputs([Video(2, 1, 2)])
    no_ids = {"input_ids": np.ones((1, 8), int), "attention_mask": None, "mm_token_type_ids": None}
    _refused("hold 0 video placeholder tokens, but the video grids give 4", videos, **no_ids)


def test_runs_that_do_not_fit_their_frames_are_refused() -> None:
    """The totals agree, the pictures do not: 6 = 4 + 2 here, 2 + 4 there."""
    inputs = _inputs([Image(2, 2), Text(3), Image(1, 2)])
    ids = np.flip(inputs["input_ids"], 1).copy()
    message = r"row 0, column 1: 2 placeholder tokens in a row, but the next frame \(4 x 4 patches\) needs 4"
    _refused(message, inputs, input_ids=ids, mm_token_type_ids=None)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("input_ids contain 256, outside the vocabulary; expected 0 .. 255", {"input_ids": np.array([[1, 256]])}),
        ("input_ids contain -1, outside", {"input_ids": np.array([[1, -1]])}),
        ("input_ids has 1 dims, expected 2", {"input_ids": np.array([1, 2])}),
        (r"input_ids have shape \[0, 4\], expected at least one row and one column", {"input_ids": np.zeros((0, 4), int)}),
        (r"input_ids have shape \[2, 0\], expected at least one row and one column", {"input_ids": np.zeros((2, 0), int)}),
        ("input_ids has rows of different lengths, expected one length; pad the shorter", {"input_ids": [[1, 2], [3]]}),
        ("input_ids is float64, expected integers", {"input_ids": np.array([[1.0, 2.0]])}),
        (r"attention_mask has shape \[1, 3\], expected input_ids' \[1, 2\]", {"attention_mask": np.ones((1, 3), int)}),
        ("text_length = 1 is too short for input_ids of 2 columns", {"text_length": 1}),
        ("groups = 2, expected a divisor of the 1 rows", {"groups": 2}),
        ("mm_token_type_ids contradict input_ids", {"mm_token_type_ids": np.array([[0, 1]])}),
        ("pixel_values came without image_grid_thw", {"pixel_values": np.zeros((4, 96), np.float32)}),
        ("video_grid_thw came without pixel_values_videos", {"video_grid_thw": np.array([[1, 2, 2]])}),
    ],
)
def test_bad_text_inputs(message: str, changes: dict[str, Any]) -> None:
    _refused(message, {"input_ids": np.array([[1, 2]])}, **changes)


@pytest.mark.parametrize(
    "message, changes",
    [
        (r"image_grid_thw\[0\] = \[1, 3, 4\].*spatial_merge_size = 2", {"image_grid_thw": np.array([[1, 3, 4]])}),
        (r"image_grid_thw\[0\] = \[0, 4, 4\], expected positive", {"image_grid_thw": np.array([[0, 4, 4]])}),
        (r"image_grid_thw has shape \[1, 2\], expected \[n, 3\]", {"image_grid_thw": np.array([[4, 4]])}),
        (r"shape \[16, 95\], expected \[patches, 96\]", {"pixel_values": np.zeros((16, 95), np.float32)}),
        ("image_grid_thw describes 16 patches, but its pixel values hold 12", {"pixel_values": np.zeros((12, 96), np.float32)}),
        ("row_patches = 18, expected a multiple of 4", {"row_patches": 18}),
        (r"row_patches = 8, expected a multiple of 4 .* at least 16", {"row_patches": 8}),
        ("vision_rows = 0 rows of 16 patches are too few: these pictures need 1", {"vision_rows": 0}),
    ],
)
def test_bad_pictures(message: str, changes: dict[str, Any]) -> None:
    _refused(message, _inputs([Text(2), Image(2, 2), Text(1)]), **changes)


def test_check_names_the_field() -> None:
    batch = Batch.from_hf(CONFIG, **_inputs([Text(8)]))
    with pytest.raises(BatchError, match=re.escape("visual_index has shape [1, 7], expected [1, 8]")):
        dataclasses.replace(batch, visual_index=batch.visual_index[:, :7]).check()
