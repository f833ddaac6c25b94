"""Records for the data tests: a processor, small pictures, and one good record in every spelling."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.processor import Processor
from train.data_config import DataConfig, SourceConfig

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "easy_vqa"


@functools.cache
def processor() -> Processor:
    """The easy-vqa model's: 64 x 64 pictures of 64 patches, 16 visual tokens."""
    return Processor.from_pretrained(CHECKPOINT)


MODEL_CONFIG = Qwen3VLMoeConfig.from_json(CHECKPOINT)


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of noise: no two are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(seed: int) -> bytes:
    """The same as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(seed: int) -> str:
    """The same as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(seed)).decode()


def text_record(question: str, answer: str) -> dict[str, Any]:
    """A record without pictures."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def picture_record(question: str, answer: str, *images: Any) -> dict[str, Any]:
    """A record whose pictures come before the question."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        "images": list(images),
    }


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One line each; a `str` is written as it is, so that it can be broken."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(*paths: Path, **changes: Any) -> DataConfig:
    """A DataConfig over these files, small enough for the tests."""
    sizes: dict[str, Any] = dict(
        sequence_length=96, batch_rows=4, accumulation=1, vision_groups=2, vision_rows=2, row_patches=64, prefetch=0
    )
    return DataConfig(sources=tuple(SourceConfig(str(path)) for path in paths), **{**sizes, **changes})
