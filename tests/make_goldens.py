"""Writes tests/data/goldens.npz: transformers' fp32 logits for tests/test_goldens.py. Needs torch.

    python -m tests.make_goldens    (when a case or a config changes)

The weights are not stored: `random_hf_tensors` makes them again from the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers

from tests import cases, reference, tiny
from tests.hf_checkpoints import random_hf_tensors

FILE = Path(__file__).parent / "data" / "goldens.npz"
CONFIGS = {"tiny": tiny.TINY, "dense": tiny.DENSE}
CASES = ("image", "mixed", "text_left_padded")


def main() -> None:
    """Runs the reference on each config and case, and stores float32 logits under `config/case`."""
    arrays: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    for name, config in CONFIGS.items():
        model = reference.build_model(config, random_hf_tensors(config))
        for case in CASES:
            arrays[f"{name}/{case}"] = reference.logits(model, cases.CASES[case](config))
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB from transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
