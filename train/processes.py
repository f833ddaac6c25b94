"""Several processes as one program: when jax.distributed starts, and the little that the processes say to each other.

Every process runs the same loop and calls what is here at the same points of it, as it does the collectives of a step. With one
process each of these functions does nothing but give back its argument.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qvlmoe_jax.errors import ConfigError, QvlmoeError
from train.errors import TrainingError

if TYPE_CHECKING:
    from train.config import DistributedConfig

T = TypeVar("T")

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # as jax asks for them
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def cluster(environment: Mapping[str, str]) -> str | None:
    """The cluster whose variables say that this is one of several processes: `slurm`, `ompi`, `tpu`, or None."""
    if all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1:
        return "slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    hosts = next((environment[name] for name in _TPU_HOSTS if name in environment), "")
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or "1")
    return "tpu" if len(hosts.split(",")) * slices > 1 else None


def arguments(config: DistributedConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None: it is not called.

    The config's values come first, then `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`, then what jax finds
    of SLURM, Open MPI or a TPU pod.

    Raises:
      ConfigError: a coordinator without process numbers (or the reverse) where no cluster could complete them.
    """

    def number(given: int | None, name: str) -> int | None:
        if given is not None or name not in environment:
            return given
        try:
            return int(environment[name])
        except ValueError:
            raise ConfigError(f"{name} = {environment[name]!r} in the environment, expected a whole number") from None

    if config.initialize == "never":
        return None
    found = {
        "coordinator_address": config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": number(config.num_processes, "JAX_NUM_PROCESSES"),
        "process_id": number(config.process_id, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in found.items() if value is None]
    detected = cluster(environment) is not None or config.initialize == "always"
    if missing and not detected:
        if len(missing) == len(found) or found["num_processes"] == 1:
            return None
        raise ConfigError(
            f"distributed: {', '.join(missing)} unknown and no cluster found to tell; expected distributed.coordinator, "
            ".num_processes and .process_id (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) together"
        )
    times = {"heartbeat_timeout_seconds": config.heartbeat_timeout, "initialization_timeout": config.initialization_timeout}
    return {**found, **times, **({} if missing else {"cluster_detection_method": "deactivate"})}


def initialize(config: DistributedConfig) -> None:
    """Starts jax.distributed where the config or the environment asks for it. Call it before anything else of jax.

    Raises:
      ConfigError: incomplete settings. TrainingError: the other processes were not there in time.
    """
    chosen = arguments(config, os.environ)
    if chosen is None:
        return
    import jax

    # Its handler would swallow SIGTERM outside the training loop; inside, the loop agrees on where to stop by itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**chosen)
    except (RuntimeError, ValueError) as error:
        count, where = chosen["num_processes"] or "all", chosen["coordinator_address"] or "the cluster's coordinator"
        raise TrainingError(
            f"jax.distributed did not start ({str(error).splitlines()[0]}); expected {count} processes at {where} within "
            f"{config.initialization_timeout} s"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    import jax

    return jax.process_index() == 0


def exchange(number: int) -> list[int]:
    """Every process's `number` (int32), in their order. A collective."""
    import jax

    if jax.process_count() == 1:
        return [number]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.array([number], np.int32))).reshape(-1).tolist()


def gather(value: Any) -> list[Any]:
    """Every process's `value` (what JSON can hold), in their order. A collective."""
    import jax

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = exchange(len(text))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def in_all(action: Callable[[], T]) -> T:
    """What `action`, which is no collective, returns here; or an error in all: where it fails its own, elsewhere a TrainingError
    of the first one's words."""
    error: Exception | None = None
    value: Any = None
    try:
        value = action()
    except (QvlmoeError, OSError) as raised:
        error = raised
    said = next((words for words in gather(None if error is None else str(error)) if words is not None), None)
    if error is not None:
        raise error
    if said is not None:
        raise TrainingError(said)
    return value


def by_first(action: Callable[[], Any]) -> None:
    """Runs `action` in process 0; then all go on, or all raise: process 0 its error, the others a TrainingError of its words."""
    error: Exception | None = None
    if is_first():
        try:
            action()
        except (QvlmoeError, OSError) as raised:
            error = raised
    said = gather(None if error is None else str(error))[0]
    if error is not None:
        raise error
    if said is not None:
        raise TrainingError(said)
