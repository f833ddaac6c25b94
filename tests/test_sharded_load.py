"""Two real processes of four devices each load one sharded model: the same logits, each reading little but its own share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from tests import cases, ours, tiny, tolerances
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.xla_flags import ONE_DEVICE

ROOT = Path(__file__).parents[1]
MAX_AMPLIFICATION = 1.1
"""Bytes that a process reads, beside those of its share."""
# 62 MB, most of it experts, as in the released models
CONFIG = tiny.variant(
    tiny.UNIFORM,
    text_config={
        "vocab_size": 1024,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_experts": 64,
        "moe_intermediate_size": 144,
        "num_key_value_heads": 4,
    },
    vision_config={"out_hidden_size": 256},
)
MESHES = [{"expert": 8}, {"expert": 2, "fsdp": 4}, {"fsdp": 2, "data": 4}]
"""Axes are laid out data first: of the last mesh each process holds both halves of every parameter, twice."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_processes(plan: dict[str, Any], place: Path) -> list[list[dict[str, Any]]]:
    """What each process found, by process and case."""
    file = place / "plan.json"
    file.write_text(json.dumps(plan | {"port": free_port(), "processes": 2, "out": str(place / "result")}))
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharded_load", str(file), str(i)],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return [json.loads((place / f"result.{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_processes_read_their_shares_and_agree_with_one_device(everything: bool, tmp_path: Path, record: Any) -> None:
    source = write_hf_checkpoint(tmp_path / "hf", CONFIG, random_hf_tensors(CONFIG, dtype=ml_dtypes.bfloat16), shards=2)
    converted = tmp_path / "jax"
    assert main(["hf2jax", str(source), str(converted)]) == 0
    rows = [[cases.Text(5), cases.Image(2, 3), cases.Text(4 + i)] for i in range(8)]
    inputs = cases.build(CONFIG, rows)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(source, dtype=np.float32)
    expected = np.asarray(ours.forward(model, ours.make_batch(CONFIG, inputs)), np.float32)
    valid = np.asarray(ours.make_batch(CONFIG, inputs).segment_ids) > 0

    few = [(str(converted), MESHES[0]), (str(converted), MESHES[1]), (str(source), MESHES[1])]
    work = few if not everything else [(str(directory), mesh) for directory in (converted, source) for mesh in MESHES]
    np.savez(tmp_path / "inputs.npz", **inputs)
    plan = {"config": CONFIG, "inputs": str(tmp_path / "inputs.npz"), "cases": work}
    for process, results in enumerate(run_processes(plan, tmp_path)):
        for (directory, mesh), result in zip(work, results, strict=True):
            what = f"{Path(directory).name} on {mesh}, process {process}"
            assert np.abs(np.asarray(result["logits"], np.float32) - expected)[valid].max() < tolerances.LOGITS, what
            assert result["largest"] <= result["shard"], what
            if Path(directory) == converted:
                record(f"bytes read / share, {mesh}", result["read"] / result["share"])
                assert result["share"] < result["read"] <= MAX_AMPLIFICATION * result["share"], (
                    what,
                    result["read"],
                    result["share"],
                )
