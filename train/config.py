"""The config of a run: frozen dataclasses, read from YAML with `--dotted.key value` on top, saved whole with the run.

An unknown key is refused with the nearest known name. Relative paths are relative to where the command runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.lora import LoraConfig
from train.config_tree import build, override, plain
from train.data_config import DataConfig


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} = {value}, expected more than 0")
        _finite(name, value)


def _at_least_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} = {value}, expected 0 or more")
        _finite(name, value)


def _finite(name: str, value: float | None) -> None:
    if value == math.inf:
        raise ConfigError(f"{name} = {value}, expected a finite number")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
      path: a Hugging Face directory, a converted one, or a training run; its config, tokenizer and processor files are used.
      from_scratch: draw the weights (the seed system's distributions) instead of reading them; `path` then needs no weights.
      param_dtype: of the master weights and the optimizer's moments. compute_dtype: of the forward and backward pass.
      freeze: what is not trained: `vision`, `merger`, `text`, `embeddings`, `experts`, `router`, or a regular expression over
        parameter paths. Frozen parameters are kept in compute_dtype and have no gradient and no optimizer state.
    """

    path: str
    from_scratch: bool = False
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraSection(LoraConfig):
    """Adapters alone are trained; everything else is frozen, in compute_dtype or quantised (see `qvlmoe_jax.lora.LoraConfig`).

    Attributes:
      adapter: a directory in PEFT's format to begin from; its rank, alpha and targets must be those given here.
    """

    adapter: str | None = None


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: cross entropy + z_loss * mean(logsumexp^2) + aux_loss * load balancing + router_z_loss * the router's.

    Attributes:
      chunk_tokens: logits of at most about this many tokens per batch shard exist at a time.
      z_loss: over the vocabulary's logits, mean over target tokens.
      aux_loss: weight of HF's load-balancing loss, taken per microbatch; 0 = off. HF's own weight is 0.001.
      router_z_loss: over the router's logits, mean over valid tokens and MoE layers (arXiv 2202.08906, where it is 0.001).
    """

    chunk_tokens: int = 1024
    z_loss: float = 0.0
    aux_loss: float = 0.0
    router_z_loss: float = 0.0

    def __post_init__(self) -> None:
        _positive(chunk_tokens=self.chunk_tokens)
        _at_least_zero(z_loss=self.z_loss, aux_loss=self.aux_loss, router_z_loss=self.router_z_loss)


@dataclass(frozen=True)
class RouterConfig:
    """Load balance without a loss: a bias per expert, added to the router's probabilities for the choice of experts alone.

    Attributes:
      bias_update_rate: after each step an expert with less than the mean load gains this much, one with more loses it
        (arXiv 2408.15664, where it is 0.001); 0 = no bias. Hugging Face's architecture has no such bias: see docs/training.md.
    """

    bias_update_rate: float = 0.0

    def __post_init__(self) -> None:
        _at_least_zero(bias_update_rate=self.bias_update_rate)


@dataclass(frozen=True)
class OptimizerConfig:
    """
    Attributes:
      b1, b2: None = the optimizer's own default (adamw 0.9, 0.95; lion 0.9, 0.99; muon's momentum 0.95). Of adafactor
        b1 is the momentum, by default none, and b2 is not a factor but the exponent 0.8 of `1 - step^-b2`.
      eps: adamw's, and adamw's inside muon.
      weight_decay: decoupled, times the learning rate; matrices only (norms and biases have none).
      clip_norm: of the gradient's global norm; None = no clipping.
      moment_dtype: of the first moment; None = param_dtype.
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 1e-5
    b1: float | None = None
    b2: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    moment_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        _positive(eps=self.eps, clip_norm=self.clip_norm)
        _at_least_zero(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} = {value}, expected at least 0 and less than 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run: linear warm-up over `warmup_steps`, whose last one has the peak (transformers' schedules
    begin at 0 and reach it a step later), then

    `constant`; `linear` or `cosine` from the peak down towards `final_fraction` of it; `wsd`: constant, then linear down over the
    last `decay_steps`. As in transformers and optax `final_fraction` belongs to step `steps`, one after the last: the last of 10
    steps of `linear`, number 9, takes 0.1 of the peak, not 0.
    """

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        _at_least_zero(warmup_steps=self.warmup_steps, final_fraction=self.final_fraction)
        if self.final_fraction > 1:
            raise ConfigError(f"final_fraction = {self.final_fraction}, expected at most 1, the peak itself")
        _positive(decay_steps=self.decay_steps)
        if self.name != "wsd" and self.decay_steps is not None:
            raise ConfigError(f"decay_steps = {self.decay_steps} is wsd's, and the schedule is {self.name}; expected null")
        if self.name == "wsd" and self.decay_steps is None:
            raise ConfigError("schedule wsd needs decay_steps, how many of the last steps the rate falls over")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (see `qvlmoe_jax.sharding`); all 1 = no mesh."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        _positive(**vars(self))

    @property
    def batch_shards(self) -> int:
        """Over how many parts batch rows and vision groups are spread."""
        return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train together. All null: as the environment says (docs/pods.md), alone where it says nothing.

    Attributes:
      initialize: `auto` calls `jax.distributed.initialize` where these keys, `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES`
        and `JAX_PROCESS_ID`, or a cluster's own variables (SLURM, Open MPI, TPU pods) ask for it; `always` lets jax look
        further (the metadata server of a TPU VM); `never` does not.
      coordinator: `host:port` of process 0. num_processes: how many. process_id: which one this is.
      heartbeat_timeout: seconds after which a process that is not heard of counts as dead and the others end.
      initialization_timeout: seconds to wait for the others at the start.
    """

    initialize: Literal["auto", "always", "never"] = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 100
    initialization_timeout: int = 300

    def __post_init__(self) -> None:
        _positive(num_processes=self.num_processes, heartbeat_timeout=self.heartbeat_timeout)
        _positive(initialization_timeout=self.initialization_timeout)
        _at_least_zero(process_id=self.process_id)


@dataclass(frozen=True)
class CheckpointConfig:
    """
    Attributes:
      every: steps between checkpoints; the last step is always saved. 0 = only the last one.
      keep: how many of the newest stay. best: how many of the best by `best_metric` stay besides.
      best_metric: a loss is best low, anything else high.
      export: write RUN/export (Hugging Face layout) at the end, in export_dtype; None = as trained.
    """

    every: int = 500
    keep: int = 2
    best: int = 0
    best_metric: Literal["validation_loss", "token_accuracy", "exact_match"] = "validation_loss"
    export: bool = True
    export_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        _at_least_zero(every=self.every, best=self.best)
        _positive(keep=self.keep)


@dataclass(frozen=True)
class ValidationConfig:
    """
    Attributes:
      data: the held-out records. every: steps between validations. batches: how many batches of them; None = one epoch.
    """

    data: DataConfig
    every: int = 500
    batches: int | None = None

    def __post_init__(self) -> None:
        _positive(every=self.every, batches=self.batches)
        if self.batches is None and self.data.sources[0].weight is not None:
            raise ConfigError("batches is null, one epoch, but a mixture with weights has no end; expected a number of batches")


@dataclass(frozen=True)
class MetricsConfig:
    """
    Attributes:
      every: steps between lines; a checkpoint has one too. Each line averages over the steps since the one before.
      tensorboard, wandb, mlflow: also write there (each needs its own package). wandb_project: defaults to the run's name.
      peak_tflops: of one device in compute_dtype, for MFU; None = from a table of known accelerators, else no MFU.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: bool = False
    mlflow: bool = False
    wandb_project: str | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        _positive(every=self.every, peak_tflops=self.peak_tflops)


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
      run: directory it writes; a run found there is resumed.
      steps: optimizer steps of the whole run. seed: of weights and (folded in) everything else random.
      max_bad_steps: the run stops after this many non-finite steps in a row (each is skipped and counted).
      lora: train low-rank adapters on a frozen model; None = train the model.
      profile: directory for a trace of the run from its fourth step on (`--profile DIR` with a small `steps`).
    """

    run: str
    steps: int
    model: ModelConfig
    data: DataConfig
    seed: int = 0
    max_bad_steps: int = 10
    profile: str | None = None
    validation: ValidationConfig | None = None
    lora: LoraSection | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        _positive(steps=self.steps, max_bad_steps=self.max_bad_steps)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}, expected 0 .. 2^63 - 1")
        used = self.schedule.warmup_steps + (self.schedule.decay_steps or 0)
        if used > self.steps:
            raise ConfigError(f"schedule: warmup_steps + decay_steps = {used} is more than steps = {self.steps}")
        if self.lora is not None and (self.model.freeze or self.model.from_scratch):
            which = "freeze" if self.model.freeze else "from_scratch"
            raise ConfigError(
                f"lora trains only adapters, on the weights of model.path, and model.{which} is set; expected it not to be "
                "(lora.targets chooses what is adapted)"
            )
        if self.checkpoint.best and self.validation is None:
            raise ConfigError("checkpoint.best is set, but nothing tells which is best; expected a validation section")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads CONFIG.yaml and applies `--dotted.key value` (or `--dotted.key=value`) pairs; values are YAML.

    Raises:
      ConfigError: the file is missing or not YAML in UTF-8, a key is unknown, a value is refused; by dotted path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8") from None
    tree = _yaml(text, str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, expected keys and values")
    for key, value in _pairs(overrides):
        override(tree, key, _yaml(value, f"--{key}"))
    return build(TrainConfig, tree)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    except (ValueError, LookupError, AttributeError) as error:  # from PyYAML's making of dates, numbers and tagged values
        raise ConfigError(
            f"{where}: holds a value that YAML takes for a date, a number or a tag but cannot read ({error}); expected text such "
            "as '2024-13-45' in quotes"
        ) from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, expected a config's few levels") from None


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"{flag!r} on the command line, expected --dotted.key value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} has no value, expected --{key} VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def dump_config(config: Any) -> str:
    """The resolved config as YAML; `load_config` of it gives the same config."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def as_config(tree: Mapping[str, Any]) -> TrainConfig:
    """A config from plain objects, as a notebook or a test has them."""
    return build(TrainConfig, tree)
