"""transformers' Qwen3VLProcessor with its torchvision back end, beside a torch build that torchvision was not made for.

Used by tests/make_processor_goldens.py alone. Needs torchvision's Python files on sys.path (see there); its compiled operators
are not used by the processors, so their absence is hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def processor(directory: Path) -> Any:
    """transformers' processor of a checkpoint directory."""
    _hide_missing_operators()
    from transformers import Qwen3VLProcessor

    return Qwen3VLProcessor.from_pretrained(directory, local_files_only=True)


def _hide_missing_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio, "
        "bool aligned) -> Tensor"
    )
    _kept.append(library)
    real = torch.library.Library.impl

    def impl(*args: Any, **kwargs: Any) -> Any:
        try:
            return real(*args, **kwargs)
        except RuntimeError:
            return None

    torch.library.Library.impl = impl  # ty: ignore


_kept: list[Any] = []


def fetch_with_pyav(videos: Any, sample_indices_fn: Any = None) -> Any:
    """In place of the video processor's `fetch_videos`, which wants torchcodec."""
    from transformers.video_utils import load_video

    if isinstance(videos, list):
        return list(zip(*[fetch_with_pyav(one, sample_indices_fn) for one in videos], strict=True))
    every = lambda metadata, **_: np.arange(metadata.total_num_frames)  # noqa: E731
    return load_video(videos, backend="pyav", sample_indices_fn=sample_indices_fn or every)


def tables(rows: int = 3000) -> dict[str, np.ndarray]:
    """Random arguments of HF's size and sampling functions, and their results."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video
    from transformers.video_utils import VideoMetadata

    rng = np.random.default_rng(0)
    sampler = Qwen3VLVideoProcessor()
    pictures, clips, sampled = [], [], []
    while len(pictures) < rows:
        h, w = (round(10 ** rng.uniform(0, 4.2)) for _ in range(2))
        factor, low = int(rng.choice([8, 28, 32])), int(rng.choice([256, 3136, 65536]))
        high = int(rng.choice([2 * low, 1003520, 16777216]))
        if max(h, w) <= 200 * min(h, w):
            pictures.append((h, w, factor, low, high, *smart_resize(h, w, factor, low, high)))
    while len(clips) < rows:
        t, h, w = int(rng.integers(2, 800)), *(round(10 ** rng.uniform(0, 3.6)) for _ in range(2))
        low, high = int(rng.choice([4096, 131072])), int(rng.choice([262144, 786432, 25165824]))
        try:
            size = smart_resize_video(t, h, w, temporal_factor=2, factor=32, min_pixels=low, max_pixels=high)
        except ValueError:
            continue
        clips.append((t, h, w, low, high, *size))
    for _ in range(rows // 10):
        total, rate, asked = (
            int(10 ** rng.uniform(0.31, 4.5)),
            round(float(rng.uniform(0.5, 120)), 3),
            float(rng.choice([0.5, 1, 2, 7])),
        )
        chosen = sampler.sample_frames(VideoMetadata(total_num_frames=total, fps=rate), fps=asked)
        weights = np.arange(1, len(chosen) + 1)
        sampled.append((total, rate, asked, len(chosen), chosen[-1], int((chosen * weights).sum())))
    return {
        "table/smart_resize": np.array(pictures, np.int32),
        "table/smart_resize_video": np.array(clips, np.int32),
        "table/sample_frames": np.array(sampled, np.float64),
    }
