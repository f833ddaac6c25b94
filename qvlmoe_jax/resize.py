"""Target sizes (HF's two `smart_resize`) and the resize itself, bit-equal to Pillow <= 12. Sizes are pixels, height first."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from qvlmoe_jax.errors import MediaError

MAX_ASPECT = 200


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, name: str = "the picture"
) -> tuple[int, int]:
    """A picture's size on the grid: multiples of `factor`, the area within the limits, the aspect nearly kept.

    models/qwen2_vl/image_processing_qwen2_vl.py, `smart_resize`. `round` is Python's: halves go to the even multiple.

    Args:
      name: what an error calls it.
    Raises:
      MediaError: one side is more than 200 times the other.
    """
    _refuse_slivers(height, width, f"{name} is {width} x {height} pixels")
    h_bar, w_bar = round(height / factor) * factor, round(width / factor) * factor
    if h_bar * w_bar > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        h_bar = max(factor, math.floor(height / beta / factor) * factor)
        w_bar = max(factor, math.floor(width / beta / factor) * factor)
    elif h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


def smart_resize_video(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
    name: str = "the clip",
) -> tuple[int, int]:
    """The size of every frame of a clip; the limits are on frames x area.

    models/qwen3_vl/video_processing_qwen3_vl.py, `smart_resize`: the comparison uses the rounded number of frames, the
    scale the true one.

    Args:
      name: what an error calls it.
    Raises:
      MediaError: fewer frames than one temporal patch, or one side more than 200 times the other.
    """
    if num_frames < temporal_factor:
        raise MediaError(
            f"{name} has {num_frames} frame{'s' * (num_frames != 1)}, expected at least {temporal_factor}; pass it as a picture"
        )
    size = f"{name} is {width} x {height} pixels"
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _refuse_slivers(height, width, size)
    h_bar, w_bar = round(height / factor) * factor, round(width / factor) * factor
    t_bar = round(num_frames / temporal_factor) * temporal_factor
    if t_bar * h_bar * w_bar > max_pixels:
        beta = math.sqrt((num_frames * height * width) / max_pixels)
        h_bar = max(factor, math.floor(height / beta / factor) * factor)
        w_bar = max(factor, math.floor(width / beta / factor) * factor)
    elif t_bar * h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (num_frames * height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


def resize(image: Image.Image, height: int, width: int, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """`[height,width,3]` uint8.

    Two one-way passes, horizontal first: the order of Pillow <= 12 and of torchvision. Pillow 13 picks the order by cost, and
    the result, rounded to uint8 between the passes, can be 25 grey levels away.
    """
    if image.width != width:
        image = image.resize((width, image.height), resample)
    if image.height != height:
        image = image.resize((width, height), resample)
    return np.asarray(image)


def _refuse_slivers(height: int, width: int, size: str) -> None:
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise MediaError(f"{size}, an aspect ratio of {aspect:.2f}; expected at most {MAX_ASPECT}: crop it")
