"""The launch files: valid for the API they are sent to, clean shell, and saying what the training program and the pods need."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from train.config import load_config
from train.config_tree import plain
from train.processes import arguments

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
JOBSETS = sorted(LAUNCH.glob("*.jobset.yaml"))
SCRIPTS = [LAUNCH / "slurm-gpu.sbatch", LAUNCH / "tpu-vm.sh"]
KUBERNETES = "1.31"


def _object(required: list[str] = (), **properties: Any) -> dict[str, Any]:  # type: ignore[assignment]
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
# jobset.x-k8s.io/v1alpha2, fields of JobSetSpec (JobSet v0.8); what is inside `template` is batch/v1 and checked by its schema.
JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(
        ["name"],
        name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        annotations={"type": "object", "additionalProperties": TEXT},
    ),
    spec=_object(
        ["replicatedJobs"],
        network=_object(enableDNSHostnames={"type": "boolean"}, subdomain=TEXT, publishNotReadyAddresses={"type": "boolean"}),
        suspend={"type": "boolean"},
        failurePolicy=_object(
            maxRestarts=COUNT,
            rules={
                "type": "array",
                "items": _object(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([-_,:A-Za-z0-9]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    targetReplicatedJobs={"type": "array", "items": TEXT},
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        },
                    },
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(["name", "template"], name=TEXT, replicas=COUNT, template={"type": "object"}),
        },
    ),
)
SBATCH = {  # man sbatch, 24.05
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "exclusive", "time", "requeue", "open-mode",
    "output", "signal",
}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_all_files_are_looked_at() -> None:
    assert len(JOBSETS) == 3 and {*JOBSETS, *SCRIPTS} == set(LAUNCH.iterdir())


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_a_jobset_is_valid(path: Path) -> None:
    tree = load(path)
    jsonschema.validate(tree, JOBSET)
    for job in tree["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": job["template"]["spec"]}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        spec = job["template"]["spec"]
        assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
        pod = spec["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it; the set restarts whole
        names = {container["name"] for container in pod["containers"]}
        assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"]} <= names
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == volumes
    assert tree["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_schemas_refuse() -> None:
    tree = load(JOBSETS[0])
    tree["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(tree, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": {"spec": {"containers": [], "restart": "Never"}}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_a_jobset_has_the_devices_of_its_mesh(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tree = load(path)
    spec = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "train"]
    config = load_config(container["command"][3], container["args"])
    (devices,) = (int(count) for name, count in container["resources"]["limits"].items() if name.endswith(("/tpu", "/gpu")))
    assert math.prod(plain(config.mesh).values()) == devices * spec["parallelism"]
    config.data.num_groups(config.mesh.batch_shards)  # the batch can be dealt
    variables = {one["name"]: one.get("value") for one in container.get("env", ())}
    if variables:
        assert int(variables["JAX_NUM_PROCESSES"] or 0) == spec["parallelism"]
        job = tree["spec"]["replicatedJobs"][0]["name"]
        name = tree["metadata"]["name"]
        assert variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job}-0-0.{name}:{container['ports'][0]['containerPort']}"
        found = arguments(config.distributed, {key: value or "1" for key, value in variables.items()})
        assert found is not None and found["num_processes"] == spec["parallelism"] and found["process_id"] == 1
    else:
        topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(map(int, topology.split("x"))) == devices * spec["parallelism"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True, timeout=60)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


def test_sbatch_options_are_slurms() -> None:
    text = SCRIPTS[0].read_text(encoding="utf-8")
    options = re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)
    assert len(options) > 5
    for option in options:
        assert re.fullmatch(r"--([a-z-]+)(=\S+)?", option), option
        assert option[2:].partition("=")[0] in SBATCH, option
    body = text[text.index("set -euo") :]
    assert "#SBATCH" not in body  # SLURM reads none after the first command


def test_the_sbatch_script_asks_for_another_start_unless_the_config_is_wrong(tmp_path: Path) -> None:
    for name, body in {"srun": 'exit "$STATUS"', "scontrol": 'echo "$@" >> "$0.log"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    requeued = {}
    for status, restarts in ((0, 0), (1, 0), (2, 0), (143, 3), (1, 20)):
        (tmp_path / "scontrol.log").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "STATUS": str(status)}
        environment["SLURM_RESTART_COUNT"] = str(restarts)
        done = subprocess.run(["bash", SCRIPTS[0], "c.yaml"], env=environment, timeout=60)
        assert done.returncode == status
        requeued[status, restarts] = (tmp_path / "scontrol.log").exists()
    assert requeued == {(0, 0): False, (1, 0): True, (2, 0): False, (143, 3): True, (1, 20): False}
