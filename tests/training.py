"""Parts of a training run for tests: batches in memory, a small model directory, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qvlmoe_jax import Batch
from tests import cases, ours, tiny
from tests.hf_checkpoints import random_hf_tensors
from train.config import TrainConfig, as_config

SMALL = tiny.variant(tiny.TINY, text_config={"num_hidden_layers": 2, "mlp_only_layers": []}, vision_config={"depth": 4})
"""Two MoE layers, three DeepStack levels (the third has no layer to go to): what compiles fast."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of `.compile` that halve its time: for programs of a mesh, which run once or twice."""


class ListData:
    """Batches from memory, again and again, with Grain's iterator protocol."""

    def __init__(self, batches: Sequence[Batch]):
        self.batches, self.position = batches, 0

    def __next__(self) -> Batch:
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


def labelled(config: dict[str, Any], inputs: cases.Inputs, **fields: Any) -> Batch:
    """A Batch `[B,...]` whose labels are its ids, except at padding and visual placeholders."""
    return ours.make_batch(config, inputs, labels=cases.shifted_labels(inputs, config), **fields)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Microbatches along a leading axis A."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def mixed_batches(config: dict[str, Any], count: int, *, accumulation: int = 1) -> list[Batch]:
    """`count` batches of two rows `[A,2,64]`: in turn text only, one picture, many, a video."""
    kinds = [
        lambda rng: [[cases.Text(int(rng.integers(9, 40)))], [cases.Text(int(rng.integers(9, 40)))]],
        lambda rng: [[cases.Text(4), cases.Image(2, int(rng.integers(1, 5))), cases.Text(9)], [cases.Text(13)]],
        lambda rng: [
            [cases.Text(3), cases.Image(2, 2), cases.Text(5), cases.Image(3, 1), cases.Text(6)],
            [cases.Image(int(rng.integers(1, 4)), 2), cases.Text(8), cases.Image(2, 3), cases.Text(4)],
        ],
        lambda rng: [[cases.Text(5), cases.Video(int(rng.integers(1, 4)), 2, 2), cases.Text(7)], [cases.Text(20)]],
    ]
    made = []
    for number in range(count * accumulation):
        rng = np.random.default_rng(number)
        inputs = cases.build(config, kinds[number % len(kinds)](rng), seed=number)
        made.append(labelled(config, inputs))
    return [stacked(made[i * accumulation : (i + 1) * accumulation]) for i in range(count)]


def write_model(directory: Path, config: Mapping[str, Any]) -> Path:
    """A model directory without weights, for `from_scratch`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_weights(directory: Path, config: Mapping[str, Any]) -> Path:
    """A model directory with random weights of order one."""
    ours.build_model(config, random_hf_tensors(config)).save_pretrained(directory)
    return directory


def make_config(run: Path, model: Path, **changes: Any) -> TrainConfig:
    """A short fp32 run, from scratch unless `model` has weights or adapters are trained; `changes` are nested as in YAML.
    `data` is never opened."""
    from_scratch = not (model / "model.safetensors").exists() and "lora" not in changes
    base = {
        "run": str(run),
        "steps": 6,
        "model": {"path": str(model), "from_scratch": from_scratch, "compute_dtype": "float32"},
        "data": {"sources": [{"path": "unused.jsonl"}]},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "constant"},
        "metrics": {"every": 1},
        "checkpoint": {"every": 0, "export": False},
    }
    return as_config(tiny.variant(base, **changes))
