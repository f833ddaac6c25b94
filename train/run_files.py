"""The files of a run beside its checkpoints: `config.yaml`, `hf/` (config, tokenizer, processor), `export/`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import yaml

from qvlmoe_jax import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.checkpoint import TrainedWeights, is_training_checkpoint, load_params, newest_step, open_weights
from qvlmoe_jax.errors import CheckpointError, ConfigError
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.whole_directory import whole_directory
from train.config import TrainConfig, dump_config
from train.config_tree import changes, plain

CONFIG_FILE, HF_DIR, EXPORT_DIR = "config.yaml", "hf", "export"
_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def side_directory(path: str | Path) -> Path:
    """Where a model directory keeps its config, tokenizer and processor files: itself, or a training run's `hf/`."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"model.path {path} is not a directory, expected a Hugging Face, converted or run directory")
    if is_training_checkpoint(path):
        return (newest_step(path) if (path / "checkpoints").is_dir() else path).parent.parent / HF_DIR
    return path


def copy_side_files(source: Path, destination: Path) -> None:
    """config.json, tokenizer, processor and generation files, templates; not weights and what describes them."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _SIDE_SUFFIXES and not path.name.endswith((".index.json", "conversion.json")):
            shutil.copyfile(path, destination / path.name)


def start_run(config: TrainConfig) -> list[str]:
    """Makes the run directory, or finds it; saves the resolved config and the side files.

    Returns:
      for a run that was there: what its config has changed since, a line each.
    Raises:
      ConfigError: the directory holds something that is no run.
    """
    run = Path(config.run)
    file = run / CONFIG_FILE
    changed = []
    if file.exists():
        changed = changes(yaml.safe_load(file.read_text(encoding="utf-8")), plain(config))
    elif run.exists() and any(run.iterdir()):
        raise ConfigError(f"run = {run} is not empty and no training run (no {CONFIG_FILE}), expected a new directory")
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(config), encoding="utf-8")
    if not (run / HF_DIR / "config.json").exists():
        copy_side_files(side_directory(config.model.path), run / HF_DIR)
    return changed


def export(
    destination: Path, run: Path, model: Qwen3VLMoeForConditionalGeneration, params: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Writes parameters in the hub's layout with the run's side files; the directory is replaced whole or not at all."""
    flat = flatten(params)
    cast = nest({path: leaf if dtype is None else jnp.asarray(leaf, dtype) for path, leaf in flat.items()})
    with whole_directory(destination, suffix=".exporting", overwrite=destination.exists()) as staging:
        model.with_params(cast).save_pretrained(staging)
        for path in (run / HF_DIR).iterdir():
            if path.name != "config.json":  # written with the weights' dtype
                shutil.copyfile(path, staging / path.name)


def export_run(source: Path, destination: Path, dtype: str | None = None) -> None:
    """Exports the newest step of a RUN, or `RUN/checkpoints/STEP`.

    Raises:
      CheckpointError: `source` is no training run, or the destination is in use.
    """
    if not source.is_dir() or not is_training_checkpoint(source):
        raise CheckpointError(f"{source}: not a training run, expected RUN or RUN/checkpoints/STEP")
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination}: exists and is not empty, expected a new directory")
    weights = open_weights(source)
    assert isinstance(weights, TrainedWeights)
    hf = weights.side_directory
    model = Qwen3VLMoeForConditionalGeneration.abstract(Qwen3VLMoeConfig.from_json(hf))
    export(destination, hf.parent, model, load_params(weights), dtype)
