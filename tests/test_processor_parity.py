"""The processor against transformers' (stored by tests/make_processor_goldens.py): ids, grids, pixels; and sizes against HF's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvlmoe_jax.errors import ProcessorError
from qvlmoe_jax.processor import Processor
from qvlmoe_jax.processor_files import VideoSettings
from qvlmoe_jax.resize import resize, smart_resize, smart_resize_video
from qvlmoe_jax.videos import sample_frames
from tests import processor_cases, qwen_tokenizer
from tests.processor_cases import LARGE_PICTURE_SIZES, PICTURE_SIZES, Case
from tests.tolerances import GREY_LEVELS

DATA = Path(__file__).parent / "data"
CHATS, VIDEOS = processor_cases.chat_cases(), processor_cases.video_cases()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_pretrained(qwen_tokenizer.build(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return dict(np.load(DATA / "processor_goldens.npz"))


@pytest.fixture(scope="module")
def goldens_457() -> dict[str, np.ndarray]:
    return dict(np.load(DATA / "processor_goldens_457.npz"))


def stored(goldens: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    found = {key.removeprefix(f"{name}/"): value for key, value in goldens.items() if key.startswith(f"{name}/")}
    assert "input_ids" in found
    return found


def encode(processor: Processor, case: Case, **options: Any) -> dict[str, np.ndarray]:
    return processor.encode(case.conversations, **{**case.options, **options})


def compare(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Ids, masks and grids are equal; the largest difference of the stored pixels in grey levels is returned."""
    assert set(got) == {key for key in expected if "." not in key}
    worst = 0.0
    for key, value in got.items():
        if key.startswith("pixel_values"):
            assert value.shape == tuple(expected[f"{key}.shape"])
            assert value.dtype == np.float32
            levels = processor_cases.sampled_levels(value).astype(int)
            worst = max(worst, float(np.abs(levels - expected[key]).max()))
        else:
            np.testing.assert_array_equal(value, expected[key], err_msg=key)
            assert value.dtype == np.int64
    return worst


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in LARGE_PICTURE_SIZES[1:]]


@pytest.mark.parametrize("size", [*PICTURE_SIZES, LARGE_PICTURE_SIZES[0], *LARGE], ids=lambda size: "{}x{}".format(*size))
def test_pictures(
    processor: Processor, goldens: dict[str, np.ndarray], record: Callable[[str, float], None], size: tuple[int, int]
) -> None:
    name = "picture/{}x{}".format(*size)
    got = encode(processor, processor_cases.picture_case(size))
    worst = compare(got, stored(goldens, name))
    record("processor: grey levels from torchvision's resize, pictures", worst)
    assert worst <= GREY_LEVELS

    # and not one from Pillow 12, whose two passes ours are
    _, rows, columns = got["image_grid_thw"][0] * 16
    resized = resize(processor_cases.picture(*size), int(rows), int(columns))
    assert hashlib.sha256(resized.tobytes()).hexdigest() == str(goldens[f"pillow/{size[0]}x{size[1]}"])
    np.testing.assert_array_equal(pixels_of(got["pixel_values"], got["image_grid_thw"][0]), resized)


def pixels_of(rows: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """`[H,W,3]` grey levels put together again, patch by patch, from pixel_values."""
    _, h, w = (int(n) for n in grid)
    both = np.round(rows * 127.5 + 127.5).astype(np.uint8).reshape(h // 2, w // 2, 2, 2, 3, 2, 16, 16)
    np.testing.assert_array_equal(both[:, :, :, :, :, 0], both[:, :, :, :, :, 1])  # a picture is one frame twice
    return both[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * 16, w * 16, 3)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(processor: Processor, goldens: dict[str, np.ndarray], record: Callable[[str, float], None], name: str) -> None:
    worst = compare(encode(processor, VIDEOS[name], video_prompt="wrapped"), stored(goldens, f"video/{name}"))
    record("processor: grey levels from torchvision's resize, videos", worst)
    assert worst <= GREY_LEVELS


@pytest.mark.parametrize("name", [name for name in VIDEOS if name not in processor_cases.NOT_IN_457])
def test_the_released_video_prompt(processor: Processor, goldens_457: dict[str, np.ndarray], name: str) -> None:
    """The default, which transformers 4.57 writes."""
    expected = stored(goldens_457, f"video/{name}")
    got = encode(processor, VIDEOS[name])
    for key in expected:
        np.testing.assert_array_equal(got[key], expected[key], err_msg=key)
    assert len(encode(processor, VIDEOS[name], video_prompt="wrapped")["input_ids"][0]) > len(got["input_ids"][0])


@pytest.mark.parametrize("name", CHATS)
def test_conversations(processor: Processor, goldens: dict[str, np.ndarray], name: str) -> None:
    assert compare(encode(processor, CHATS[name], video_prompt="wrapped"), stored(goldens, f"chat/{name}")) <= GREY_LEVELS


@pytest.mark.parametrize("name", CHATS)
def test_conversations_of_457(processor: Processor, goldens_457: dict[str, np.ndarray], name: str) -> None:
    got, expected = encode(processor, CHATS[name]), stored(goldens_457, f"chat/{name}")
    for key in expected:
        np.testing.assert_array_equal(got[key], expected[key], err_msg=key)


def test_a_picture_where_the_template_prints_none(processor: Processor) -> None:
    """transformers drops it from the text and keeps its pixels; the model would fail later, or answer about nothing."""
    conversation = [{"role": "system", "content": [{"type": "image", "image": processor_cases.picture(64, 64)}]}]
    with pytest.raises(ProcessorError, match="hold 1 pictures, but their text has 0 placeholders"):
        processor.encode([*conversation, {"role": "user", "content": "Hi"}])


def test_there_are_enough_cases() -> None:
    assert len(PICTURE_SIZES) >= 40 and len(VIDEOS) >= 12 and len(CHATS) >= 12


def test_decode_gives_the_text_back(processor: Processor, goldens: dict[str, np.ndarray]) -> None:
    ids = goldens["chat/scripts/input_ids"][0]
    with_markers = processor.decode(ids, skip_special_tokens=False)
    assert with_markers.startswith("<|im_start|>user\nnaïve café é — 中文字符 русский العربية हिन्दी 🎉👩\u200d👩\u200d👧")
    assert with_markers.replace("<|im_start|>", "").replace("<|im_end|>", "") == processor.decode(ids)
    batch = goldens["chat/batch_left/input_ids"]
    assert processor.batch_decode(batch[:1])[0] == "user\nHi\nassistant\n"  # padding and markers are special tokens


def test_sizes_of_pictures(goldens: dict[str, np.ndarray]) -> None:
    table = goldens["table/smart_resize"].tolist()
    assert len(table) == 3000
    for h, w, factor, low, high, *expected in table:
        assert smart_resize(h, w, factor=factor, min_pixels=low, max_pixels=high) == tuple(expected)


def test_sizes_of_videos(goldens: dict[str, np.ndarray]) -> None:
    table = goldens["table/smart_resize_video"].tolist()
    assert len(table) == 3000
    for t, h, w, low, high, *expected in table:
        got = smart_resize_video(t, h, w, factor=32, temporal_factor=2, min_pixels=low, max_pixels=high)
        assert got == tuple(expected)


def test_sampling_of_frames(goldens: dict[str, np.ndarray]) -> None:
    table = goldens["table/sample_frames"].tolist()
    assert len(table) == 300
    for total, rate, asked, count, last, weighted in table:
        got = sample_frames(int(total), rate, VideoSettings(fps=asked))
        assert (len(got), got[-1], (got * np.arange(1, count + 1)).sum()) == (count, last, weighted)


def test_the_comparison_would_see_a_wrong_order_of_patches(processor: Processor, goldens: dict[str, np.ndarray]) -> None:
    got = encode(processor, processor_cases.picture_case((333, 517)))
    _, h, w = got["image_grid_thw"][0]
    raster = got["pixel_values"].reshape(h // 2, w // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(h * w, -1)
    wrong = {**got, "pixel_values": np.ascontiguousarray(raster)}
    assert compare(wrong, stored(goldens, "picture/333x517")) > 50
