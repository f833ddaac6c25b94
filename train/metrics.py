"""Where figures go: `RUN/metrics.jsonl` always, one line per interval on the terminal, TensorBoard, W&B or MLflow if asked."""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.config import MetricsConfig
from train.errors import TrainingError

if TYPE_CHECKING:
    from qvlmoe_jax.moe import RouterStats

METRICS_FILE = "metrics.jsonl"


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file. A last line that a kill cut short is left out.

    Raises:
      TrainingError: another line is not one that was written: a fault of the disk, or of an editor.
    """
    path = Path(run) / METRICS_FILE
    if not path.exists():
        return []
    read = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not line:
            continue
        try:
            read.append(json.loads(line))
        except ValueError:  # not JSON, or not UTF-8
            raise TrainingError(f"{path}: line {number} is not JSON; remove the line") from None
    return read


def router_load(stats: RouterStats, bias: Any = None) -> dict[str, list[float]]:
    """Per MoE layer, from sums `[L,...]` and the bias `[L,E]`: busiest expert over the mean, entropy of the load over log E,
    number of dead experts, router z-loss, largest bias."""
    load = np.asarray(stats.tokens_per_expert, np.float64)
    z_loss = np.asarray(stats.log_z_squared, np.float64) / np.maximum(stats.num_tokens, 1)
    share = load / np.maximum(load.sum(-1, keepdims=True), 1)
    entropy = -np.sum(share * np.log(np.maximum(share, 1e-30)), axis=-1) / max(math.log(load.shape[-1]), 1e-9)
    return {
        "max_over_mean": [round(float(x), 4) for x in share.max(-1) * load.shape[-1]],
        "entropy": [round(float(x), 4) for x in entropy],
        "dead": [int(x) for x in (load == 0).sum(-1)],
        "z_loss": [round(float(x), 4) for x in z_loss],
        **({} if bias is None else {"bias": [round(float(x), 6) for x in np.abs(bias).max(-1)]}),
    }


def memory_gib() -> dict[str, float]:
    """Peak bytes in GiB: of this process, and of the first device where the platform tells."""
    import jax  # not needed to read or plot metrics

    scale = 1 if sys.platform == "darwin" else 1024
    out = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        out["device_peak_gib"] = stats["peak_bytes_in_use"] / 2**30
    return out


class Metrics:
    """Writes lines; only process 0's instance writes anything."""

    def __init__(self, run: str | Path, config: MetricsConfig, resolved: Mapping[str, Any], *, resume_step: int = 0):
        """
        Args:
          resolved: the whole config as plain objects, for the services that show it.
          resume_step: lines of later steps are removed: those steps are run again.
        Raises:
          TrainingError: a service's package is not installed.
        """
        import jax

        self._sinks: list[Any] = []
        self._file: Any = None
        if jax.process_index():
            return
        name = Path(run).resolve().name
        if config.tensorboard:
            self._sinks.append(_tensorboard(Path(run) / "tensorboard"))
        if config.wandb:
            self._sinks.append(_wandb(config.wandb_project or name, name, resolved))
        if config.mlflow:
            self._sinks.append(_mlflow(name, resolved))
        path = Path(run) / METRICS_FILE
        kept = [line for line in read_metrics(run) if line["step"] <= resume_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, Any], *, show: Sequence[str] = ()) -> None:
        """One line of `kind` (train, validation): to the file at once, and the fields of `show` to the terminal."""
        if self._file is None:
            return
        clean = {key: _plain(value) for key, value in values.items() if value is not None}
        self._file.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
        self._file.flush()
        shown = "  ".join(f"{key} {_short(clean[key])}" for key in show if key in clean)
        print(f"{kind} {step:>7}  {shown}", flush=True)
        scalars = {f"{kind}/{key}": value for key, value in clean.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink(scalars, step)

    def close(self) -> None:
        """Ends the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON has no NaN


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _module(name: str, wanted_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TrainingError(f"{wanted_by} needs the package {name}, which is not installed; pip install {name}") from None


def _tensorboard(directory: Path) -> Any:
    writer = _module("tensorboardX", "metrics.tensorboard").SummaryWriter(str(directory))

    def sink(scalars: Mapping[str, float], step: int) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return sink


def _wandb(project: str, name: str, resolved: Mapping[str, Any]) -> Any:
    run = _module("wandb", "metrics.wandb").init(project=project, name=name, id=name, resume="allow", config=dict(resolved))
    return lambda scalars, step: run.log(dict(scalars), step=step)


def _mlflow(name: str, resolved: Mapping[str, Any]) -> Any:
    mlflow = _module("mlflow", "metrics.mlflow")
    mlflow.set_experiment(name)
    mlflow.start_run(run_name=name)
    mlflow.log_dict(dict(resolved), "config.json")
    return lambda scalars, step: mlflow.log_metrics(dict(scalars), step=step)
