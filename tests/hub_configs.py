"""The released models' `config.json`, as `tests.tiny` has the small ones."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import ConfigDict, variant

DATA = Path(__file__).parent / "data"

HUB_30B: ConfigDict = json.loads((DATA / "config_30b_a3b.json").read_text(encoding="utf-8"))
"""Qwen3-VL-30B-A3B."""

HUB_4B: ConfigDict = json.loads((DATA / "config_4b.json").read_text(encoding="utf-8"))
"""Qwen3-VL-4B: dense, tied."""

HUB_235B: ConfigDict = variant(
    HUB_30B,
    text_config={
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
    vision_config={"out_hidden_size": 4096},
)
"""Qwen3-VL-235B-A22B: the 30B's file with the facts that differ."""
