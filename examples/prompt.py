"""A picture and a question as the arrays Hugging Face's processor returns, from the files of a checkpoint directory.

Numpy, Pillow, jinja2 and tokenizers do it; neither torch nor transformers is needed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tokenizers import Tokenizer

IMAGE_PAD = "<|image_pad|>"


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, area within bounds (transformers' `smart_resize`)."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def patchify(image: Image.Image, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """`pixel_values [patches, C*T*p*p]` and `image_grid_thw [1, 3]` of one picture.

    Rows come merge block by merge block: (h//m, w//m, m, m). Horizontal and vertical resizing are two calls because Pillow 13
    chooses their order inside one by the size, earlier releases did not.

    Args:
      settings: the content of `preprocessor_config.json`.
    """
    p, m, t = settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]
    sizes = settings["size"]
    h, w = smart_size(
        image.height, image.width, factor=p * m, min_pixels=sizes["shortest_edge"], max_pixels=sizes["longest_edge"]
    )
    image = image.convert("RGB")
    image = image.resize((w, image.height), Image.Resampling.BICUBIC).resize((w, h), Image.Resampling.BICUBIC)
    mean, std = np.float32(settings["image_mean"]), np.float32(settings["image_std"])
    pixels = (np.asarray(image, np.float32) / 255 - mean) / std
    blocks = pixels.reshape(h // p // m, m, p, w // p // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # hb wb mh mw C ph pw
    patches = np.repeat(blocks[:, :, :, :, :, None], t, axis=5)  # a still picture fills every frame of its temporal patch
    return patches.reshape(h // p * (w // p), -1), np.array([[1, h // p, w // p]])


def encode(directory: str | Path, image: Image.Image, question: str) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """The chat prompt for one picture and one question, and the tokenizer to read the answer with.

    Returns:
      `input_ids [1,T]`, `attention_mask [1,T]`, `pixel_values [patches, C*T*p*p]`, `image_grid_thw [1,3]`.
    """
    directory = Path(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text(encoding="utf-8"))
    pixel_values, grid = patchify(image, settings)
    template = jinja2.Template((directory / "chat_template.jinja").read_text(encoding="utf-8"))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = template.render(messages=[message], add_generation_prompt=True)
    num_visual_tokens = int(grid.prod()) // settings["merge_size"] ** 2
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = np.array([tokenizer.encode(text.replace(IMAGE_PAD, IMAGE_PAD * num_visual_tokens)).ids])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixel_values, "image_grid_thw": grid}
    return inputs, tokenizer
