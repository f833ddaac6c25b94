"""The rows of the table that read and write files: processor, loading, conversion."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.machine import CORES, ROOT
from benchmarks.models import quarter
from benchmarks.pairs import Timed, compare
from benchmarks.rows import Sizes
from convert.hf2jax import hf2jax
from convert.jax2hf import jax2hf
from qvlmoe_jax import Processor, Qwen3VLMoeForConditionalGeneration
from tests import hf_checkpoints

sys.path.insert(0, str(ROOT / "examples"))
from tiny_checkpoint import write_checkpoint

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def processor(sizes: Sizes) -> Iterator[Timed]:
    """Eight conversations of a picture of 1024 x 768 and a question: template, tokens, resizing, patches.

    Theirs is the tokenizer's template and ids and the Pillow image processor; the torchvision one needs a build of torchvision.
    """
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)
    question = "What is in this picture, and what would you change about it?"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_checkpoint(directory)
        own = Processor.from_pretrained(directory)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        images = Qwen2VLImageProcessorPil.from_pretrained(directory)

        def talk(picture: Any) -> list[dict[str, Any]]:
            return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]

        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")

        def theirs() -> Any:
            seen = images(images=[picture] * 8, return_tensors="np")
            texts = tokenizer.apply_chat_template(
                [talk(picture)] * 8, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            counts = seen["image_grid_thw"].prod(1) // images.merge_size**2
            texts = [t.replace("<|image_pad|>", "<|image_pad|>" * int(n)) for t, n in zip(texts, counts, strict=True)]
            return tokenizer(texts, padding=True, return_tensors="np"), seen

        def ours() -> Any:
            return own.encode([talk(picture)] * 8, add_generation_prompt=True)

        ids, seen = theirs()
        mine = ours()
        assert np.array_equal(mine["input_ids"], ids["input_ids"])
        assert np.allclose(mine["pixel_values"], seen["pixel_values"], atol=1e-5)
        yield compare(
            "processor, 8 pictures of 1024 x 768",
            ours,
            {"Pillow": theirs},
            pairs=sizes.pairs,
            limit=sizes.limit,
            per=(8, "pictures"),
        )


def files(sizes: Sizes) -> Iterator[Timed]:
    """Loading, and conversion both ways beside transformers' load and save of the same bytes; files are in the page cache."""
    config = quarter(sizes.layers)
    tensors = hf_checkpoints.random_hf_tensors(config)
    size = sum(t.nbytes for t in tensors.values())
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        source, converted, made, back, saved = (base / n for n in ("hf", "jax", "made", "back", "saved"))
        hf_checkpoints.write_hf_checkpoint(source, config, tensors=tensors)
        del tensors
        hf2jax(source, converted)
        torch.set_num_threads(CORES)

        def clear() -> None:
            for directory in (made, back, saved):
                shutil.rmtree(directory, ignore_errors=True)

        def load(directory: Path) -> Any:
            return jax.block_until_ready(Qwen3VLMoeForConditionalGeneration.from_pretrained(directory))

        def theirs() -> Any:
            model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
            # Parameters are views of the mapped file: one number of every page, or nothing was loaded.
            return sum(float(p.detach().flatten()[::1024].sum()) for p in model.parameters())

        def save() -> Any:
            transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(source, dtype=torch.float32).save_pretrained(saved)

        rows = {
            "loading, HF directory": (lambda: load(source), theirs, "from_pretrained"),
            "loading, converted directory": (lambda: load(converted), theirs, "from_pretrained"),
            "conversion, hf2jax": (lambda: hf2jax(source, made), save, "from_pretrained + save_pretrained"),
            "conversion, jax2hf": (lambda: jax2hf(converted, back), save, "from_pretrained + save_pretrained"),
        }
        for what, (own, other, setting) in rows.items():
            yield compare(
                what,
                own,
                {setting: other},
                pairs=sizes.pairs,
                limit=sizes.limit,
                per=(size / 1e9, "GB"),
                before=clear,
            )
