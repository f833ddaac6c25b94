"""When jax.distributed starts: by config, by environment, by cluster, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from qvlmoe_jax.errors import ConfigError
from train import processes
from train.config import DistributedConfig

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        ({}, {}, None),
        ({}, {"SLURM_JOB_ID": "7"}, None),  # a shell of an allocation
        ({}, {**SLURM, "SLURM_NTASKS": "1"}, None),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # every pod has it
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({}, SLURM, (None, None, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, (None, None, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, (None, None, None)),
        ({}, {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5", "OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ({"initialize": "always"}, {}, (None, None, None)),
        ({"initialize": "never"}, {**SLURM, **JAX}, None),
        ({}, JAX, ("a:1", 4, 3)),
        ({"process_id": 0}, JAX, ("a:1", 4, 0)),
        ({"coordinator": "b:2", "num_processes": 2, "process_id": 1}, {}, ("b:2", 2, 1)),
        ({"coordinator": "b:2"}, SLURM, ("b:2", None, None)),
    ],
)
def test_what_jax_is_told(given: dict[str, Any], environment: dict[str, str], found: tuple[Any, ...] | None) -> None:
    told = processes.arguments(DistributedConfig(**given), environment)
    if found is None:
        assert told is None
    else:
        assert told is not None
        assert (told["coordinator_address"], told["num_processes"], told["process_id"]) == found
        assert told["heartbeat_timeout_seconds"] == 100
        assert ("cluster_detection_method" in told) == (None not in found)


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({"coordinator": "b:2"}, {}, "num_processes, process_id unknown and no cluster found"),
        ({"num_processes": 2, "process_id": 0}, {}, "coordinator_address unknown"),
        ({}, {**JAX, "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID = 'x' in the environment, expected a whole number"),
    ],
)
def test_half_a_setting_is_refused(given: dict[str, Any], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processes.arguments(DistributedConfig(**given), environment)


def test_one_process_talks_to_itself() -> None:
    assert processes.exchange(7) == [7] and processes.gather({"a": [1]}) == [{"a": [1]}] and processes.is_first()
    with pytest.raises(ConfigError, match="wrong"):
        processes.by_first(lambda: (_ for _ in ()).throw(ConfigError("wrong")))
    assert processes.in_all(lambda: 3) == 3
    with pytest.raises(ConfigError, match="wrong"):
        processes.in_all(lambda: (_ for _ in ()).throw(ConfigError("wrong")))
