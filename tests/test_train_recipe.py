"""`python -m train examples/recipe.yaml`: every part of a recipe in one run, and what the run leaves behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.checkpoint import load_params, open_weights
from qvlmoe_jax.param_tree import flatten
from tests.xla_flags import ONE_DEVICE
from train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import tiny_checkpoint  # noqa: E402

pytestmark = pytest.mark.slow


def command(*arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    run = [sys.executable, "-m", "train", *map(str, arguments)]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode == 0) == ok, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("recipe")
    tiny_checkpoint.write_checkpoint(base / "model")
    command("examples/recipe.yaml", "--model.path", base / "model", f"--run={base / 'run'}", "--profile", base / "trace")
    return base / "run"


def test_the_run_learns_validates_and_keeps_its_figures(run: Path) -> None:
    lines = read_metrics(run)
    training = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in training] == [1, 2, 3, 4] and [line["step"] for line in validation] == [2, 4]
    assert training[-1]["loss"] < training[0]["loss"]
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"]
    assert validation[0]["answers"] == 5  # four records, one of them with two answers
    assert training[0]["vision_padding"] < 1 and 0 < training[0]["text_padding"] < 1
    wanted = {"aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second", "samples_per_second", "step_seconds"}
    wanted |= {"data_wait_fraction", "model_tflops_per_second", "router", "host_peak_gib", "accuracy", "bad_steps"}
    assert wanted <= training[0].keys()
    assert len(training[0]["router"]["max_over_mean"]) == tiny_checkpoint.CONFIG["text_config"]["num_hidden_layers"]
    assert any((run.parent / "trace").rglob("*.xplane.pb"))
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["b1"] is None  # resolved: every key is there


def test_the_export_is_the_newest_checkpoint(run: Path) -> None:
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert steps[-1] == 4 and len(steps) <= 2  # one latest, one best
    trained = flatten(load_params(open_weights(run)))
    exported = flatten(load_params(open_weights(run / "export")))
    assert trained.keys() == exported.keys()
    for path, leaf in trained.items():
        assert exported[path].dtype == "bfloat16"
        assert np.array_equal(np.asarray(leaf.astype("bfloat16")), np.asarray(exported[path])), path
    names = {path.name for path in (run / "export").iterdir()}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "model.safetensors"} <= names
    frozen = {path for path, leaf in trained.items() if leaf.dtype == "bfloat16"}
    assert frozen and all("visual" in path and "merger" not in path for path in frozen)
    start = flatten(load_params(open_weights(run.parent / "model")))
    for path in trained:
        same = np.array_equal(np.asarray(start[path]), np.asarray(exported[path]))
        assert same or path not in frozen, path
    assert not np.array_equal(np.asarray(start["lm_head/weight"]), np.asarray(exported["lm_head/weight"]))


def test_plot_export_and_going_on(run: Path, tmp_path: Path) -> None:
    assert Path(command("plot", run).stdout.strip()).read_bytes().startswith(b"\x89PNG")
    command("export", run / "checkpoints" / "4", tmp_path / "again", "--dtype", "bfloat16")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "export" / "model.safetensors").read_bytes()
    assert "not empty" in command("export", run, tmp_path / "again", ok=False).stderr
    assert Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "again").config.text_config.num_experts
    # the finished run, asked for more steps, goes on; a run may also start from another run
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    done = command("examples/recipe.yaml", "--model.path", run.parent / "model", f"--run={longer}", "--steps", 5)
    assert "resuming with another config: steps: 4 -> 5" in done.stderr and "step 4" in done.stderr
    assert [line["step"] for line in read_metrics(longer) if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    other = command("examples/recipe.yaml", "--model.path", run, f"--run={longer}", "--model.freeze", "[text]", ok=False)
    assert other.returncode == 2 and "arrays are not this config's" in other.stderr and len(other.stderr.splitlines()) <= 6


def test_the_lora_example_runs_and_leaves_its_exports(run: Path) -> None:
    model, adapted = run.parent / "model", run.parent / "lora"
    command("examples/lora.yaml", "--model.path", model, f"--run={adapted}")
    losses = [line["loss"] for line in read_metrics(adapted)]
    assert losses[-1] < losses[0]
    assert open_weights(adapted / "export").shapes == open_weights(model).shapes
    assert (adapted / "adapter" / "adapter_config.json").is_file()
