"""What `examples/easy_vqa.yaml` trains on: easy-vqa's pictures and questions as records, and a small model to start from.

python examples/easy_vqa_data.py [--out DIR] [--versions N]

Needs `pip install easy-vqa`: 4000 + 1000 pictures of one shape each, 38,575 + 9,673 questions, 13 answers; the second part is
held out. Writes into DIR, build/easy_vqa by default:

    start/                    config, a small tokenizer, Qwen3-VL's chat template, processor files; no weights
    train.parquet             the training part, `--versions` times: as it is, and with the shape moved and mirrored
    heldout.parquet           the held-out part
    heldout_shuffled.parquet  the same questions and answers, each with another question's picture
    train_blind.parquet, heldout_blind.parquet    without pictures
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tiny_checkpoint import SIDE_FILES, added_ids, build_tokenizer

HERE = Path(__file__).resolve().parent
CHAT_TEMPLATE = HERE / "qwen3_vl_chat_template.jinja"
PICTURE_SIDE = 64
SEED = 11

# 256 bytes, what the merges of easy-vqa's 40 words make of them, and Qwen's 26 added tokens.
VOCAB_SIZE = 394
TOKEN_IDS = added_ids(VOCAB_SIZE)

# Every part of the released architecture, each small: 0.51 million parameters. initializer_range is what 0.02 is to the
# released widths, about 1 / sqrt(hidden_size).
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "transformers_version": "4.57.0",
    "tie_word_embeddings": False,
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 80,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 3, 3], "rope_type": "default"},
        "initializer_range": 0.1,
        "use_cache": True,
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": TOKEN_IDS["<|im_end|>"],
    },
    "vision_config": {
        "model_type": "qwen3_vl_moe",
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": 80,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.1,
    },
}

# 64 x 64 pictures stay as they are, others are scaled to the same area.
_SIZES = {"size": {"shortest_edge": PICTURE_SIDE**2, "longest_edge": PICTURE_SIDE**2}, "patch_size": 8}


def write_start(directory: Path, words: Iterable[str]) -> None:
    """A checkpoint directory without weights: `python -m train` draws them (`model.from_scratch`).

    Args:
      words: the text that the tokenizer's merges are learnt from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    files = {
        "config.json": CONFIG,
        "preprocessor_config.json": {**SIDE_FILES["preprocessor_config.json"], **_SIZES},
        "video_preprocessor_config.json": {**SIDE_FILES["video_preprocessor_config.json"], "patch_size": 8},
        "tokenizer_config.json": {**SIDE_FILES["tokenizer_config.json"], "chat_template": template},
        "generation_config.json": {
            "bos_token_id": TOKEN_IDS["<|endoftext|>"],
            "pad_token_id": TOKEN_IDS["<|endoftext|>"],
            "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
            "do_sample": False,
            "transformers_version": "4.57.0",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    build_tokenizer(words, VOCAB_SIZE).save(str(directory / "tokenizer.json"))


def tokenizer_words(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """What the tokenizer is learnt from: each question and answer once, and the roles."""
    return [*sorted({text for pair in pairs for text in pair}), "user\n", "assistant\n", "system\n"]


def load_split(part: str) -> tuple[list[np.ndarray], list[tuple[str, str, int]]]:
    """The pictures `[64,64,3]` of `train` or `test`, and (question, answer, picture number)."""
    import easy_vqa

    paths = getattr(easy_vqa, f"get_{part}_image_paths")()
    questions, answers, numbers = getattr(easy_vqa, f"get_{part}_questions")()
    pictures = []
    for i in range(len(paths)):
        with Image.open(paths[i]) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return pictures, list(zip(questions, answers, numbers, strict=True))


def move_shape(picture: np.ndarray, background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture's one shape, mirrored or not, somewhere else on a plain `background` colour.

    No question asks where the shape is, so every answer stays true.
    """
    corners, counts = np.unique(picture[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0, return_counts=True)
    inside = (picture != corners[counts.argmax()]).any(axis=-1)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    shape, inside = picture[box], inside[box]
    if rng.random() < 0.5:
        shape, inside = shape[:, ::-1], inside[:, ::-1]
    height, width = inside.shape
    moved = np.broadcast_to(background, picture.shape).copy()
    row, column = rng.integers(0, PICTURE_SIDE + 1 - height), rng.integers(0, PICTURE_SIDE + 1 - width)
    target = moved[row : row + height, column : column + width]
    target[inside] = shape[inside]
    return moved


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a picture; colours are few, so it is small."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def record(question: str, answer: str, picture: bytes | None) -> dict[str, Any]:
    """HF's `messages` and `images`."""
    content: list[dict[str, Any]] = [{"type": "image", "text": None}] if picture is not None else []
    return {
        "messages": [
            {"role": "user", "content": [*content, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [] if picture is None else [{"bytes": picture, "path": None}],
    }


_SCHEMA = pa.schema(
    [
        (
            "messages",
            pa.list_(
                pa.struct(
                    [("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))]
                )
            ),
        ),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)


def write_parquet(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes records as they come. Returns how many."""
    total, rows = 0, []
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        for row in records:
            rows.append(row)
            if len(rows) == 2048:
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                total, rows = total + len(rows), []
        writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    return total + len(rows)


def write_all(out: Path, versions: int) -> dict[str, int]:
    """Writes everything the module's docstring lists. Returns the number of records of each file."""
    rng = np.random.default_rng(SEED)
    pictures, questions = load_split("train")
    held_pictures, held_questions = load_split("test")
    out.mkdir(parents=True, exist_ok=True)

    def training() -> Iterator[dict[str, Any]]:
        for version in range(versions):
            for question, answer, number in questions:
                picture = pictures[number]
                if version:
                    picture = move_shape(picture, pictures[rng.integers(len(pictures))][0, 0], rng)
                yield record(question, answer, png(picture))

    def held_out(picture_of: Callable[[int], np.ndarray]) -> Iterator[dict[str, Any]]:
        for i, (question, answer, _) in enumerate(held_questions):
            yield record(question, answer, png(picture_of(i)))

    def blind(part: list[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
        return (record(question, answer, None) for question, answer, _ in part)

    write_start(out / "start", tokenizer_words((question, answer) for question, answer, _ in questions))
    elsewhere = rng.permutation(len(held_questions))
    files = {
        "train.parquet": training(),
        "heldout.parquet": held_out(lambda i: held_pictures[held_questions[i][2]]),
        "heldout_shuffled.parquet": held_out(lambda i: held_pictures[held_questions[elsewhere[i]][2]]),
        "train_blind.parquet": blind(questions),
        "heldout_blind.parquet": blind(held_questions),
    }
    return {name: write_parquet(out / name, records) for name, records in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/easy_vqa"))
    parser.add_argument(
        "--versions", type=int, default=4, help="how often each training record appears, each with its own picture"
    )
    args = parser.parse_args()
    for name, count in write_all(args.out, args.versions).items():
        print(f"{args.out / name}: {count} records")
    print(f"{args.out / 'start'}: config, tokenizer and processor files")


if __name__ == "__main__":
    main()
