"""Asks the small model of examples/easy_vqa about pictures it was not trained on, and says which answers are right.

python examples/easy_vqa_demo.py [CHECKPOINT]

The eight pictures of examples/easy_vqa/heldout and their questions are easy-vqa's own (MIT licence), from its held-out part.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.generate import generate
from qvlmoe_jax.processor import Processor

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "easy_vqa"
HELD_OUT = CHECKPOINT / "heldout"


def ask(directory: Path, questions: list[dict[str, Any]]) -> list[str]:
    """The model's answer to each question, all in one batch."""
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype="float32")
    processor = Processor.from_pretrained(directory)
    prompts = []
    for row in questions:
        content = [{"type": "image", "image": str(HELD_OUT / row["image"])}, {"type": "text", "text": row["question"]}]
        prompts.append([{"role": "user", "content": content}])
    tokens = np.asarray(generate(model, processor(prompts, padding_side="left"), max_new_tokens=4))
    return [processor.decode(row) for row in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    questions = json.loads((HELD_OUT / "questions.json").read_text(encoding="utf-8"))
    answers = ask(args.checkpoint, questions)
    right = 0
    for image, rows in groupby(zip(questions, answers, strict=True), key=lambda pair: pair[0]["image"]):
        print(f"held-out picture {image}")
        for row, answer in rows:
            right += answer == row["answer"]
            mark = "" if answer == row["answer"] else f"   wrong: {row['answer']}"
            print(f"    {row['question']:<45} {answer}{mark}")
    print(f"{right} of {len(questions)} answers are right")


if __name__ == "__main__":
    main()
