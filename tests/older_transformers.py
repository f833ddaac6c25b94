"""The same logits as transformers 4.57, whose inputs, config spelling and expert layout differ from 5.x.

Needs an environment of its own, since the tests pin 5.x:

    python3 -m venv .venv-457 && .venv-457/bin/pip install torch==2.13.0 && .venv-457/bin/pip install -e . transformers==4.57.6
    .venv-457/bin/python -m tests.older_transformers

Prints the largest error per config and case, and exits 1 if one is over the bound of the tests.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import numpy as np
import torch
import transformers

from qvlmoe_jax import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from tests import cases, ours, tiny
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import LOGITS

CONFIGS = {"tiny": tiny.TINY, "other": tiny.OTHER, "dense": tiny.DENSE}
CASES = ("text", "image", "two_images", "video", "mixed", "left_padded", "right_padded")


def main() -> int:
    """Weights into 4.57's model, its own save_pretrained into ours, logits side by side."""
    print("transformers", transformers.__version__)
    worst = 0.0
    for name, config in CONFIGS.items():
        prefix = "Qwen3VLMoe" if config["model_type"] == "qwen3_vl_moe" else "Qwen3VL"
        hf_config = getattr(transformers, f"{prefix}Config")(**copy.deepcopy(config))
        theirs = getattr(transformers, f"{prefix}ForConditionalGeneration")(hf_config).eval().requires_grad_(False)
        theirs.load_state_dict({key: torch.from_numpy(value) for key, value in random_hf_tensors(config).items()}, strict=True)
        with tempfile.TemporaryDirectory() as directory:
            theirs.save_pretrained(directory)
            model = Qwen3VLMoeForConditionalGeneration.from_pretrained(directory)
        assert model.config == Qwen3VLMoeConfig.from_hf(config)
        for case in CASES:
            inputs = cases.CASES[case](config)
            theirs.model.rope_deltas = None
            # 4.57 derives the token types from the ids
            expected = theirs(**{k: torch.from_numpy(v) for k, v in inputs.items() if k != "mm_token_type_ids"}).logits.numpy()
            error = float(np.abs(ours.logits(model, config, inputs) - expected)[cases.valid(inputs)].max())
            worst = max(worst, error)
            print(f"{name:<8}{case:<16}{error:.2e}")
    return int(worst > LOGITS)


if __name__ == "__main__":
    sys.exit(main())
