"""Qwen3-VL-30B-A3B's own config with fewer decoder layers: true widths, a size that fits one device or one disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "qwen3-vl-30b-a3b" / "config.json"


def true_widths(layers: int) -> dict[str, Any]:
    """A `config.json` object; the vision tower keeps its 27 blocks."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = layers
    return config
