"""Options that are of no kind the processor knows: each is one line, none is taken for something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qvlmoe_jax.errors import QvlmoeError
from qvlmoe_jax.processor import Processor
from tests import qwen_tokenizer

VIDEO = {"type": "video", "video": np.zeros((20, 48, 80, 3), np.uint8)}
CHAT = [{"role": "user", "content": [VIDEO, {"type": "text", "text": "?"}]}]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_pretrained(qwen_tokenizer.build(tmp_path_factory.mktemp("processor")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": float("inf")}, "fps is inf, expected more than 0"),
        ({"do_sample_frames": "no"}, "do_sample_frames is 'no', expected true or false"),
        ({"images_kwargs": {"do_resize": 0}}, "do_resize is 0, expected true or false"),
        ({"images_kwargs": {"min_pixels": True}}, "min_pixels is True, expected a positive integer"),
        ({"images_kwargs": {"image_mean": [0.5, float("nan"), 0.5]}}, "image_mean is .*, expected three numbers"),
        ({"images_kwargs": {"size": {"height": 64, "width": 64}}}, "size is .*, expected an object with shortest_edge and"),
        ({"images_kwargs": [1]}, "images_kwargs is .*, expected a dict"),
        ({"videos_kwargs": 5}, "videos_kwargs is 5, expected a dict"),
        ({"video_metadata": 5}, "video_metadata is 5, expected a list with a dict for each video"),
        ({"video_metadata": ["a"]}, "video_metadata is .*, expected a list with a dict"),
        *(({"video_metadata": [{"fps": fps}]}, "fps is .*, expected a number") for fps in (-3, "30", float("nan"))),
        ({"video_metadata": [{"frames_indices": 5}], "do_sample_frames": False}, "1 frames_indices for 20 frames"),
        ({"video_metadata": [{"frames_indices": ["a"] * 20}], "do_sample_frames": False}, "expected a number for each"),
        ({"video_prompt": "raplaced"}, "video_prompt is 'raplaced', expected 'replaced' or 'wrapped'"),
        ({"tools": 5}, "tools are 5, expected a list of dicts"),
        ({"tools": {"name": "f"}}, "tools are .*, expected a list of dicts"),
    ],
    ids=str,
)
def test_an_option_of_no_known_kind_is_refused_by_name(processor: Processor, options: Any, message: str) -> None:
    with pytest.raises(QvlmoeError, match=message):
        processor.encode(CHAT, **options)


def test_numbers_may_be_numpys(processor: Processor) -> None:
    options: dict[str, Any] = {"num_frames": np.int64(6), "video_metadata": [{"fps": np.float32(4)}]}
    arrays = processor.encode(CHAT, **options)
    assert arrays["video_grid_thw"][0, 0] == 3


@pytest.mark.parametrize("ids", [[5, -100], [2**32]])
def test_ids_of_no_token_are_refused(processor: Processor, ids: list[int]) -> None:
    with pytest.raises(QvlmoeError, match="expected those of tokens"):
        processor.decode(ids)
