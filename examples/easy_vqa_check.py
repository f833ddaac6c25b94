"""Asks a trained easy-vqa model every held-out question and counts the right answers; compares the answers with transformers'.

python examples/easy_vqa_check.py CHECKPOINT [--data DIR] [--questions N] [--transformers N]

DIR is what examples/easy_vqa_data.py wrote. Three figures: with the right pictures, with pictures shuffled among the questions
(what is then right is luck: answers that the question alone makes likely), and, with --transformers (needs torch), in how many of
the first N questions transformers generates exactly the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.generate import generate
from qvlmoe_jax.processor import Processor
from train.data_config import SourceConfig
from train.formats import to_messages
from train.media import load_media
from train.records import Records

BATCH, PROMPT_COLUMNS, NEW_TOKENS = 128, 64, 4
Conversation = list[dict[str, Any]]


def load_questions(path: Path) -> Iterator[tuple[Conversation, str]]:
    """The user's turns of each record, and the answer."""
    records = Records([SourceConfig(str(path))])
    for i in range(len(records)):
        record = records[i]
        *prompt, answer = load_media(to_messages(record), record.root)
        yield prompt, answer["content"][0]["text"]


def batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    """Lists of BATCH items; the last may be shorter."""
    while chunk := list(islice(items, BATCH)):
        yield chunk


def answer(model: Qwen3VLMoeForConditionalGeneration, processor: Processor, prompts: list[Conversation]) -> np.ndarray:
    """Greedy answers `[n, NEW_TOKENS]`."""
    full = prompts + [prompts[-1]] * (BATCH - len(prompts))  # one shape, one compilation
    has_pictures = any(item["type"] == "image" for item in prompts[0][0]["content"])
    rows, patches = (BATCH, 64) if has_pictures else (None, None)
    batch = processor(full, padding_side="left", text_length=PROMPT_COLUMNS, vision_rows=rows, row_patches=patches)
    return np.asarray(generate(model, batch, max_new_tokens=NEW_TOKENS))[: len(prompts)]


def accuracy(model: Qwen3VLMoeForConditionalGeneration, processor: Processor, path: Path, limit: int | None) -> tuple[int, int]:
    """Right answers and questions."""
    right = asked = 0
    for chunk in batches(islice(load_questions(path), limit)):
        answers = answer(model, processor, [prompt for prompt, _ in chunk])
        right += sum(processor.decode(row) == text for row, (_, text) in zip(answers, chunk, strict=True))
        asked += len(chunk)
    return right, asked


def transformers_answers(directory: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The same prompts through transformers, in float32."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == model.config.image_token_id).int()
    ids = model.generate(**tensors, max_new_tokens=NEW_TOKENS, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :].numpy()


def same_as_transformers(
    directory: Path, model: Qwen3VLMoeForConditionalGeneration, processor: Processor, path: Path, n: int
) -> int:
    """How many of the first n questions get exactly the same tokens."""
    same = 0
    for chunk in batches(islice(load_questions(path), n)):
        prompts = [prompt for prompt, _ in chunk]
        ours = answer(model, processor, prompts)
        theirs = transformers_answers(directory, processor.encode(prompts, padding_side="left"))
        same += int((ours[:, : theirs.shape[1]] == theirs).all(axis=1).sum())  # transformers stops when every row has ended
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=Path("build/easy_vqa"))
    parser.add_argument("--questions", type=int, help="the first N of each file only")
    parser.add_argument("--transformers", type=int, default=0, metavar="N")
    args = parser.parse_args()
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(args.checkpoint, dtype="float32")
    processor = Processor.from_pretrained(args.checkpoint)
    for name in ("heldout", "heldout_shuffled"):
        right, asked = accuracy(model, processor, args.data / f"{name}.parquet", args.questions)
        print(f"{name}: {right} of {asked} right, {right / asked:.1%}", flush=True)
    if args.transformers:
        path = args.data / "heldout.parquet"
        same = same_as_transformers(args.checkpoint, model, processor, path, args.transformers)
        print(f"the same tokens as transformers: {same} of {args.transformers}")


if __name__ == "__main__":
    main()
