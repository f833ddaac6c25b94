"""The processor against transformers' own on random conversations: pictures and videos of any size, options, batches.

Needs what tests/make_processor_goldens.py needs (torch, torchvision's Python files on PYTHONPATH):

    PYTHONPATH=TORCHVISION python -m tests.fuzz_processor 120

Prints the largest difference in grey levels; stops at the first id, mask or grid that differs.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qvlmoe_jax.processor import Processor
from tests import hf_processor, qwen_tokenizer
from tests.make_processor_goldens import reference
from tests.processor_cases import Case, clip, picture
from tests.tolerances import GREY_LEVELS

WORDS = 'the cat, sat\n\n on 12 mats! Ünï 中文 <b> {x} "q" \'ll 🎉 \t  ﬁ Å'.split(" ")


def main() -> None:
    """Draws and compares as many cases as the command line says (default 120)."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    rng, worst = random.Random(7), 0.0
    with tempfile.TemporaryDirectory() as directory:
        hf = hf_processor.processor(qwen_tokenizer.build(Path(directory)))
        ours = Processor.from_pretrained(directory, video_prompt="wrapped")
        for number in range(count):
            case = random_case(rng)
            expected = reference(hf, case, older=False)
            for key, got in ours.encode(case.conversations, **case.options).items():
                if key.startswith("pixel_values"):
                    worst = max(worst, float(np.abs(got - expected[key]).max()) * 127.5)
                else:
                    np.testing.assert_array_equal(got, expected[key], err_msg=f"case {number}: {key}")
    print(f"{count} cases: ids, masks and grids equal; largest difference of pixels {worst:.2f} grey levels")
    sys.exit(round(worst) > GREY_LEVELS)


def random_case(rng: random.Random) -> Case:
    """One or two conversations of one to four turns."""
    metadata: list[dict[str, Any]] = []
    conversations = [_conversation(rng, metadata) for _ in range(rng.choice([1, 1, 2]))]
    options: dict[str, Any] = {
        "padding_side": rng.choice(["left", "right"]),
        "do_sample_frames": rng.random() < 0.6,
        "add_generation_prompt": rng.random() < 0.8,
        "add_vision_id": rng.random() < 0.3,
        "cap_pixels_per_frame": rng.random() < 0.3,
    }
    return Case(conversations, {**options, **({"video_metadata": metadata} if metadata else {})})


def _conversation(rng: random.Random, metadata: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": _text(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        parts: list[dict[str, Any]] = []
        for _ in range(rng.randint(0, 2)):
            if rng.random() < 0.6:
                parts.append({"type": "image", "image": picture(*_size(rng, 1, 800), seed=rng.randint(0, 99))})
                continue
            frames = rng.randint(4, 40)
            parts.append({"type": "video", "video": clip(frames, *_size(rng, 4, 200), rng.randint(0, 9))})
            fps = rng.choice([1.0, 7.5, 24.0, 29.97, 60.0])
            metadata.append({"fps": fps, "total_num_frames": frames, "frames_indices": list(range(frames))})
        parts.insert(rng.randint(0, len(parts)), {"type": "text", "text": _text(rng)})
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": _text(rng)}]
    return messages[: -1 if rng.random() < 0.7 else None]


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30)))


def _size(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    while True:
        height, width = (round(low * (high / low) ** rng.random()) for _ in range(2))
        if max(height, width) <= 200 * min(height, width):
            return height, width


if __name__ == "__main__":
    main()
