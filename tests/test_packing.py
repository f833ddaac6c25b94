"""Packing loses nothing, overfills nothing, and a packed document computes what it computes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.batch import IGNORED_LABEL
from qvlmoe_jax.errors import ConfigError
from tests import tolerances
from tests.data_cases import MODEL_CONFIG, config, picture, processor
from train.data_config import DataConfig
from train.documents import Document
from train.packing import Packer

VISION = MODEL_CONFIG.vision_config
UNIT, WIDTH = VISION.merge_unit, VISION.patch_width


def document(number: int, text: int, frames: list[tuple[int, int]]) -> Document:
    """`text` tokens, then each frame's: every token, label and pixel says which document and place it is of."""
    tokens = [height * width // UNIT for height, width in frames]
    n = text + sum(tokens)
    visual = np.arange(n) >= text
    return {
        "name": str(number),
        "error": None,
        "input_ids": np.full(n, number, np.int32),
        "labels": np.arange(n, dtype=np.int32) + 1000 * number,
        "position_ids": np.arange(3 * n, dtype=np.int32).reshape(3, n),
        "visual": visual,
        "frame_sizes": np.array(frames, np.int32).reshape(-1, 2),
        "pixel_values": np.full((sum(tokens) * UNIT, WIDTH), number) + np.arange(sum(tokens) * UNIT)[:, None] / 4096,
    }


sizes = st.sampled_from([(2, 2), (2, 4), (4, 4), (4, 6), (8, 8)])
shapes = st.lists(st.tuples(st.integers(1, 40), st.lists(sizes, max_size=3)), min_size=1, max_size=40)


@settings(max_examples=60)
@given(shapes, st.sampled_from([(1, 4, 2), (2, 2, 1), (3, 6, 3)]), st.integers(1, 3))
def test_nothing_is_lost_cut_or_overfilled(shapes: Any, layout: tuple[int, int, int], rows: int) -> None:
    A, B, G = layout
    settings = config_of(accumulation=A, batch_rows=B, vision_groups=G, vision_rows=rows)
    packer = Packer(settings, VISION)
    documents = [document(i + 1, text, frames) for i, (text, frames) in enumerate(shapes)]
    batches, homeless = [], []
    for doc in documents:
        if not packer.add(doc):
            if packer.empty:
                homeless.append(doc["name"])
                continue
            batches.append(packer.finish())
            if not packer.add(doc):
                homeless.append(doc["name"])
    if not packer.empty:
        batches.append(packer.finish())
    # A document without a place alone would not fit any batch.
    for doc in documents:
        fits = len(doc["input_ids"]) <= 96 and can_hold(doc["frame_sizes"].prod(axis=1).tolist(), rows)
        assert fits == (doc["name"] not in homeless)

    found = [piece for batch in batches for piece in pieces(batch, settings)]
    assert sorted(found) == sorted(name for name in (doc["name"] for doc in documents) if name not in homeless)
    by_name = {doc["name"]: doc for doc in documents}
    for batch in batches:
        for name, piece in pieces(batch, settings).items():
            doc = by_name[name]
            for field in ("input_ids", "position_ids", "pixel_values"):
                assert np.allclose(piece[field], doc[field]), (name, field)
            assert np.array_equal(piece["labels"], np.r_[IGNORED_LABEL, doc["labels"][1:]])


def config_of(**changes: Any) -> DataConfig:
    from pathlib import Path

    return config(Path("unused.jsonl"), **changes)


def can_hold(frames: list[int], rows: int) -> bool:
    """First-fit decreasing of frames into rows of 64 patches."""
    free = [64] * rows
    for size in sorted(frames, reverse=True):
        row = next((r for r, left in enumerate(free) if left >= size), None)
        if row is None:
            return False
        free[row] -= size
    return True


def pieces(batch: Batch, settings: DataConfig) -> dict[str, dict[str, np.ndarray]]:
    """Each document of a batch, read back through segments and visual indices alone."""
    A, B = batch.input_ids.shape[:2]
    jax.tree.map(lambda leaf: leaf.shape[0] == A or pytest.fail("no leading A"), batch)
    out = {}
    used = np.zeros(batch.patch_segment_ids.shape, bool)
    for a in range(A):
        jax.tree.map(lambda leaf: leaf[a], batch).check()  # noqa: B023 - called at once
        for b in range(B):
            g = b * settings.num_groups(1) // B
            segments = batch.segment_ids[a, b]
            assert set(segments[segments > 0]) == set(range(1, segments.max() + 1))
            for segment in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == segment)
                assert np.array_equal(columns, np.arange(columns[0], columns[0] + len(columns)))
                index = batch.visual_index[a, b, columns]
                flat = (index[index >= 0][:, None] * UNIT + np.arange(UNIT)).reshape(-1)
                assert not used[a, g].reshape(-1)[flat].any(), "two documents share a patch"
                used[a, g].reshape(-1)[flat] = True
                name = str(batch.input_ids[a, b, columns[0]])
                assert name not in out
                out[name] = {
                    "input_ids": batch.input_ids[a, b, columns],
                    "labels": batch.labels[a, b, columns],
                    "position_ids": batch.position_ids[a, :, b, columns].T,
                    "pixel_values": batch.pixel_values[a, g].reshape(-1, WIDTH)[flat],
                }
    assert np.array_equal(used, batch.patch_segment_ids > 0), "a patch that no token points to"
    return out


def test_a_packed_document_computes_what_it_computes_alone() -> None:
    """Text, one picture, two pictures, another size: in one packed batch and each by `Batch.from_hf`."""
    chats = [
        chat("is there a red shape?", "yes"),
        chat("what shape is present?", "circle", picture(1)),
        chat("is it blue?", "no", picture(2), picture(3, (32, 128))),
        chat("does the image contain a circle?", "yes", picture(4, (32, 128))),
        chat("what color?", "teal", picture(5)),
    ]
    model = Qwen3VLMoeForConditionalGeneration.from_config(MODEL_CONFIG, nnx.Rngs(0))
    forward = jax.jit(lambda batch: model(batch).logits)

    from train.documents import DocumentMaker
    from train.records import RawRecord

    settings = config_of(batch_rows=2, vision_groups=1, vision_rows=3, row_patches=128)
    maker = DocumentMaker(settings, MODEL_CONFIG, processor())
    packer = Packer(settings, VISION)
    documents = []
    for i, messages in enumerate(chats):
        documents.append(maker(RawRecord(str(i), "", "auto", {"messages": messages})))
        assert documents[-1]["error"] is None
        assert packer.add(documents[-1])
    batch = jax.tree.map(lambda leaf: leaf[0], packer.finish())
    assert batch.segment_ids.max() > 1
    logits = np.asarray(forward(batch))
    placed = {}
    for b in range(2):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            columns = batch.segment_ids[b] == segment
            placed[batch.input_ids[b, columns].tobytes()] = logits[b, columns]
    for messages, doc in zip(chats, documents, strict=True):
        arrays = processor().encode([messages], add_generation_prompt=False)
        sizes = {"text_length": 96, "vision_rows": 3, "row_patches": 128}  # one program for all
        alone = np.asarray(forward(Batch.from_hf(MODEL_CONFIG, **arrays, **sizes)))[0, : len(doc["input_ids"])]
        assert np.abs(placed[doc["input_ids"].tobytes()] - alone).max() < tolerances.BUCKETING


def chat(question: str, answer: str, *pictures: Any) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("size", [10**14, 10**19])
@pytest.mark.parametrize("name", ["sequence_length", "batch_rows", "accumulation", "row_patches"])
def test_a_batch_that_no_memory_holds_is_an_error_of_the_config(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"no memory for a vision group's batch of .*{name} = {size}"):
        Packer(config(Path("r.jsonl"), vision_groups=1, **{name: size}), VISION).finish()
