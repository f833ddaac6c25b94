"""Real processes: the losses of one, the same bits after kills, the same curve and records after a change of mesh and processes.

The runs of this file are one config, eight groups on a mesh of 2 or 4 CPU devices, so that compiled programs serve several.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests import pod
from train.checkpoints import Checkpoints
from train.config import CheckpointConfig
from train.metrics import read_metrics

STEPS = 8
TWO, FOUR = ["--mesh.fsdp", "2", "--mesh.expert", "1"], ["--mesh.fsdp", "2", "--mesh.expert", "2"]
SAME = 1e-6
CONTINUED = 1e-5


class Place:
    """A config with its files; runs of it in directories of their own."""

    def __init__(self, base: Path):
        self.base, self.config = base, pod.write_run(base, steps=STEPS, data={"vision_groups": 8})
        self.cache = base / "cache"

    def arguments(self, run: Path, *more: str) -> list[str | Path]:
        return [self.config, "--run", str(run), *more]

    def validation(self) -> list[str]:
        """One epoch of few records at the last step."""
        lines = (self.base / "records.jsonl").read_text(encoding="utf-8").splitlines()[:15]
        file = self.base / "held_out.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = yaml.safe_load(self.config.read_text(encoding="utf-8"))["data"]
        # two groups of one row: the records of the first make three batches, of the second four
        section = {**data, "sources": [{"path": str(file)}], "batch_rows": 2, "accumulation": 1, "vision_groups": None}
        return ["--validation", json.dumps({"every": STEPS, "data": section})]

    def run(self, run: Path, *more: str, processes: int, devices: int) -> Path:
        pod.run(self.arguments(run, *more), processes=processes, devices=devices, cache=self.cache)
        return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("pod"))


def losses(run: Path) -> np.ndarray:
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # each step once
    return np.array([[line["loss"], line["grad_norm"], line["tokens"]] for line in lines])


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found / expected - 1).max())


def loop_state(run: Path, step: int) -> dict[str, Any]:
    """The streams and the fingerprints of every array of a checkpoint."""
    from orbax.checkpoint import v1 as ocp

    return ocp.load_checkpointables(str(run / "checkpoints" / str(step)), {"loop": None})["loop"]


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    """One process with two devices."""
    return place.run(place.base / "alone", *TWO, *place.validation(), processes=1, devices=2)


@pytest.fixture(scope="module")
def pair(place: Place) -> Path:
    """Two processes with one device each; exports at the end."""
    export = ["--checkpoint.export", "true"]
    return place.run(place.base / "pair", *TWO, *place.validation(), *export, processes=2, devices=1)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(alone: Path, pair: Path, record: Any) -> None:
    worst = far(losses(pair), losses(alone))
    record("2 processes beside 1: worst relative difference of losses and norms", worst)
    assert worst <= SAME
    one, two = ([line for line in read_metrics(run) if line["kind"] == "validation"] for run in (alone, pair))
    assert len(one) == len(two) == 1 and one[0]["answers"] == two[0]["answers"] == 15
    assert two[0]["validation_loss"] == pytest.approx(one[0]["validation_loss"], rel=SAME)
    for step in (2, STEPS):
        assert loop_state(pair, step)["data"] == loop_state(alone, step)["data"]  # the streams are at the same records


@pytest.mark.slow
def test_what_processes_export_is_their_last_checkpoint(pair: Path) -> None:
    from qvlmoe_jax.checkpoint import load_params, open_weights
    from qvlmoe_jax.param_tree import flatten

    stored, exported = (flatten(load_params(open_weights(path))) for path in (pair, pair / "export"))
    assert stored.keys() == exported.keys()
    assert all(np.array_equal(np.asarray(stored[path]), np.asarray(exported[path])) for path in stored)


def kill_and_resume(place: Place, run: Path, seed: int, kills: int) -> None:
    """SIGKILLs one of two processes at random moments; the other must end by itself, and not well; then all start again."""
    rng = random.Random(seed)
    arguments = place.arguments(run, *TWO, "--distributed.heartbeat_timeout", "10")
    for _ in range(kills):
        with pod.started(arguments, processes=2, devices=1, cache=place.cache) as children:
            done = max((line["step"] for line in read_metrics(run)), default=0)
            children[0].wait_for(rf"^train +{min(STEPS - 1, done + rng.randint(1, 3))} ")
            time.sleep(rng.uniform(0, 0.5))
            victim = rng.randrange(2)
            children[victim].kill()
            assert children[1 - victim].wait(120) != 0, children[1 - victim].report
    pod.run(arguments, processes=2, devices=1, cache=place.cache)


@pytest.mark.slow
def test_killed_twice_two_processes_end_with_the_same_bits(place: Place, pair: Path) -> None:
    kill_and_resume(place, place.base / "killed", seed=1, kills=2)
    assert loop_state(place.base / "killed", STEPS) == loop_state(pair, STEPS)  # fingerprints of every array among them
    losses(place.base / "killed")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 14))
def test_killed_often(place: Place, pair: Path, seed: int) -> None:
    run = place.base / f"killed{seed}"
    kill_and_resume(place, run, seed=seed, kills=3)
    assert loop_state(run, STEPS) == loop_state(pair, STEPS)


def halfway(source: Path, target: Path, step: int) -> Path:
    """A run as it was after `step`."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return target


@pytest.mark.slow
def test_fewer_processes_go_on(place: Place, alone: Path, pair: Path, record: Any) -> None:
    """2 processes -> 1, on the same mesh."""
    run = place.run(halfway(pair, place.base / "fewer", 4), *TWO, processes=1, devices=2)
    worst = far(losses(run), losses(alone))
    record("2 processes, then 1: worst relative difference", worst)
    assert worst <= CONTINUED
    assert loop_state(run, STEPS)["data"] == loop_state(alone, STEPS)["data"]


@pytest.mark.slow
def test_four_processes_then_two_on_half_the_mesh(place: Place, alone: Path, record: Any) -> None:
    """4 processes of one device; then 2 processes of one device: process count and mesh change, the records go on."""
    four = place.run(place.base / "four", *FOUR, processes=4, devices=1)
    worst = far(losses(four), losses(alone))
    record("4 processes on 4 devices beside 1 on 2", worst)
    assert worst <= CONTINUED
    run = place.run(halfway(four, place.base / "fourtwo", 4), *TWO, processes=2, devices=1)
    worst = far(losses(run), losses(alone))
    record("4 processes, then 2 on half the mesh: worst relative difference", worst)
    assert worst <= CONTINUED
    assert loop_state(run, STEPS)["data"] == loop_state(alone, STEPS)["data"] == loop_state(four, STEPS)["data"]


@pytest.mark.soak
def test_eight_devices_then_four(place: Place, alone: Path, record: Any) -> None:
    eight = place.run(place.base / "eight", "--mesh.fsdp", "4", "--mesh.expert", "2", processes=2, devices=4)
    run = place.run(halfway(eight, place.base / "eightfour", 4), *FOUR, processes=1, devices=4)
    for name, found in (("8 devices", eight), ("8 devices, then 4", run)):
        worst = far(losses(found), losses(alone))
        record(f"{name}: worst relative difference", worst)
        assert worst <= CONTINUED


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_same_step(place: Place, pair: Path) -> None:
    run = place.base / "stopped"
    with pod.started(place.arguments(run, *TWO), processes=2, devices=1, cache=place.cache) as children:
        children[0].wait_for(r"^train +3 ")
        children[1].process.send_signal(signal.SIGTERM)
        assert [child.wait(120) for child in children] == [143, 143], "\n".join(child.report for child in children)
    stopped = Checkpoints(run, CheckpointConfig()).steps()[-1]
    assert 3 <= stopped < STEPS and f"saved step {stopped} of {STEPS}" in children[0].out
    place.run(run, *TWO, processes=2, devices=1)
    assert loop_state(run, STEPS) == loop_state(pair, STEPS)


def start_fails(place: Place, run: Path, *more: str, last: Sequence[str] = ()) -> list[pod.Child]:
    with pod.started(place.arguments(run, *more), processes=2, devices=1, cache=place.cache, last=last) as children:
        assert [child.wait(200) for child in children] == [2, 2], "\n".join(child.report for child in children)
        return children


@pytest.mark.slow
def test_data_that_end_early_are_saved_by_all_processes(place: Place, tmp_path: Path) -> None:
    more = [*TWO, "--steps", "99", "--data.epochs", "1", "--checkpoint.every", "0"]
    children = start_fails(place, tmp_path / "run", *more)
    (done,) = Checkpoints(tmp_path / "run", CheckpointConfig()).steps()
    for child in children:
        assert f"the data ended after {done} of 99 steps; saved step {done} of 99 in" in child.errors
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, done + 1))
    place.run(tmp_path / "run", *more, "--data.epochs", "2", "--steps", str(done + 1), processes=2, devices=1)


@pytest.mark.slow
def test_bad_records_of_one_process_save_the_steps_of_all(place: Place, tmp_path: Path) -> None:
    more = [*TWO, "--steps", "99", "--data.shuffle", "false", "--data.lookahead", "0", "--checkpoint.every", "0"]
    children = start_fails(place, tmp_path / "run", *more, "--data.max_bad_records", "1")
    (done,) = Checkpoints(tmp_path / "run", CheckpointConfig()).steps()
    for child in children:
        assert "2 bad records, more than max_bad_records = 1" in child.errors
    assert f"saved step {done} of 99" in children[0].errors
    place.run(tmp_path / "run", *more, "--steps", str(done + 1), processes=2, devices=1)


def test_what_is_wrong_is_said_by_every_process_in_a_line(place: Place, tmp_path: Path) -> None:
    for child in start_fails(place, tmp_path / "run", "--mesh.fsdp", "4"):
        assert "error: mesh has 8 devices, and the 2 processes have 2; expected mesh sizes whose product is 2" in child.errors
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for child in start_fails(place, tmp_path / "other", *TWO):
        assert "is not empty and no training run" in child.errors


@pytest.mark.slow
def test_data_that_one_process_cannot_open_are_said_by_all(place: Place, tmp_path: Path) -> None:
    missing = tmp_path / "elsewhere.jsonl"
    for child in start_fails(place, tmp_path / "run", *TWO, last=["--data.sources", f"[{{path: {missing}}}]"]):
        assert f"error: {missing} does not exist, expected a file of records" in child.errors
