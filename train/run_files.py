"""The files of a run beside its checkpoints: `config.yaml`, `hf/` (config, tokenizer, processor), `export/`."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.adapter_run import open_adapted
from qvlmoe_jax.checkpoint import TrainedWeights, Weights, is_training_checkpoint, open_weights, save_hf, step_directory
from qvlmoe_jax.errors import CheckpointError, ConfigError
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.peft_format import save_adapter
from qvlmoe_jax.whole_directory import REPLACED, whole_directory
from train import processes
from train.config import DistributedConfig, TrainConfig, dump_config
from train.config_tree import changes, plain
from train.errors import TrainingError

CONFIG_FILE, HF_DIR, EXPORT_DIR, ADAPTER_DIR = "config.yaml", "hf", "export", "adapter"
EXPORTING, PARTIAL = ".exporting", ".partial"
_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def side_directory(path: str | Path) -> Path:
    """Where a model directory keeps its config, tokenizer and processor files: itself, or a training run's `hf/`."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"model.path {path} is not a directory, expected a Hugging Face, converted or run directory")
    if is_training_checkpoint(path):
        return step_directory(path).parent.parent / HF_DIR
    return path


def copy_side_files(source: Path, destination: Path) -> None:
    """config.json, tokenizer, processor and generation files, templates; not weights and what describes them."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _SIDE_SUFFIXES and not path.name.endswith((".index.json", "conversion.json")):
            shutil.copyfile(path, destination / path.name)


@contextlib.contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Makes the run directory and holds it: two programs that write one run would spoil both.

    The lock is the kernel's, on the directory itself: it leaves no file, and ends with the process however that ends.

    Raises:
      ConfigError: it is no directory. TrainingError: another process holds it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run = {run} cannot be made ({error.strerror}), expected a new directory or the one of a run"
        ) from None
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"run = {run} is in use by another process, expected one program per run; wait for it or choose another run"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def start_run(config: TrainConfig) -> list[str]:
    """Fills a new run directory with the resolved config and the side files, or finds them. Call it inside `only_writer`.

    Each appears by one rename, and what a killed process left half done goes: a run killed at any moment can be started again.

    Returns:
      for a run that was there: what its config has changed since, a line each.
    Raises:
      ConfigError: the directory holds something that is no run.
    """
    run = Path(config.run)
    file = run / CONFIG_FILE
    changed = []
    if file.exists():
        old, new = yaml.safe_load(file.read_text(encoding="utf-8")), plain(_of_any_processes(config))
        changed = changes({**old, "distributed": new["distributed"]}, new)
    elif any(path.name != CONFIG_FILE + PARTIAL for path in run.iterdir()):
        raise ConfigError(f"run = {run} is not empty and no training run (no {CONFIG_FILE}), expected a new directory")
    else:
        save_config(config)
    if not (run / HF_DIR).exists():
        partial = run / (HF_DIR + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        copy_side_files(side_directory(config.model.path), partial)
        partial.rename(run / HF_DIR)
    for name in (EXPORT_DIR, ADAPTER_DIR):
        shutil.rmtree(run / (name + EXPORTING), ignore_errors=True)
        replaced, exported = run / (name + REPLACED), run / name
        if replaced.exists() and not exported.exists():
            replaced.rename(exported)
        shutil.rmtree(replaced, ignore_errors=True)
    return changed


def save_config(config: TrainConfig) -> None:
    """Writes the resolved config into the run, whole or not at all. A resumed run's changed config is saved once it fits."""
    file = Path(config.run) / CONFIG_FILE
    partial = file.with_name(CONFIG_FILE + PARTIAL)
    partial.write_text(dump_config(_of_any_processes(config)), encoding="utf-8")
    os.replace(partial, file)


def _of_any_processes(config: TrainConfig) -> TrainConfig:
    """Without where this process is to find the others, which is another place at each start."""
    return dataclasses.replace(config, distributed=DistributedConfig())


@dataclass(frozen=True)
class _Stored:
    """A parameter that lies in a checkpoint: read where it is indexed."""

    weights: Weights
    path: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shapes[self.path]

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        slices = tuple(slice(i, i + 1) for i in index) + (slice(None),) * (len(self.shape) - len(index))
        return self.weights.read(self.path, slices, self.dtype).reshape(self.shape[len(index) :])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[()]


def export(destination: Path, run: Path, config: Qwen3VLMoeConfig, params: Mapping[str, Any], dtype: str | None = None) -> None:
    """Writes parameters in the hub's layout with the run's side files; the directory is replaced whole or not at all.

    A collective; process 0 writes.
    """
    flat = flatten(params)
    cast = nest({path: leaf if dtype is None else jnp.asarray(leaf, dtype) for path, leaf in flat.items()})
    if not processes.is_first():
        save_hf(destination, config, cast)
        return
    with whole_directory(destination, suffix=EXPORTING, overwrite=destination.exists()) as staging:
        save_hf(staging, config, cast)
        for path in (run / HF_DIR).iterdir():
            if path.name != "config.json":  # written with the weights' dtype
                shutil.copyfile(path, staging / path.name)


def export_stored(destination: Path, run: Path, weights: Weights, dtype: str | None = None) -> None:
    """The same for parameters that lie in a checkpoint, one tensor in memory at a time."""
    dtypes = weights.dtypes if dtype is None else dict.fromkeys(weights.shapes, np.dtype(jnp.dtype(dtype)))
    export(destination, run, weights.config, nest({path: _Stored(weights, path, dtypes[path]) for path in weights.shapes}))


def export_adapted(run: Path, dtype: str | None = None) -> None:
    """At the end of a LoRA run: the merged model in `RUN/export`, the adapters in PEFT's format in `RUN/adapter`."""
    weights = open_adapted(run)
    export_stored(run / EXPORT_DIR, run, weights, dtype)
    with whole_directory(run / ADAPTER_DIR, suffix=EXPORTING, overwrite=(run / ADAPTER_DIR).exists()) as staging:
        save_adapter(staging, weights.config, weights.adapters(), weights.lora, base=str(weights.base_path))


def export_adapter(source: Path, destination: Path) -> None:
    """The adapters of a LoRA RUN's newest step, or of `RUN/checkpoints/STEP`, in PEFT's format.

    Raises:
      CheckpointError: `source` is no LoRA run, or the destination is in use.
    """
    weights = open_adapted(source)
    save_adapter(destination, weights.config, weights.adapters(), weights.lora, base=str(weights.base_path))


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
    export_stored(destination, weights.side_directory.parent, weights, dtype)
