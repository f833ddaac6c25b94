"""Runs that are killed, stopped or find a damaged checkpoint end with the same bits as one that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import training
from tests.pod import Child
from tests.xla_flags import ONE_DEVICE
from train.metrics import read_metrics

STEPS = 16


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Child]]:
    """Starts the program on a run directory. The processes share one compilation cache."""
    base = tmp_path_factory.mktemp("resume")
    model = training.write_weights(base / "model", training.SMALL)
    cache = base / "cache"
    started: list[Child] = []

    def start(run: Path, steps: int = STEPS) -> Child:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": ONE_DEVICE,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        command = [sys.executable, "-m", "tests.train_program", str(run), str(model), str(steps)]
        started.append(Child(command, environment))
        return started[-1]

    yield start
    for child in started:
        child.kill()


def finish(child: Child) -> tuple[str, str]:
    """The final line's step and fingerprints, and what went to stderr."""
    assert child.wait() == 0, child.report
    return child.out.splitlines()[-1], child.errors


@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory: pytest.TempPathFactory) -> str:
    line, _ = finish(launch(tmp_path_factory.mktemp("whole") / "run"))
    assert line.startswith(f"final {STEPS} ")
    return line


def wait_for_step(child: Child, step: int) -> None:
    child.wait_for(rf"^train +({'|'.join(map(str, range(step, STEPS + 1)))}) ")


def kill_and_resume(launch, run: Path, seed: int, kills: int) -> str:
    """Kills the run `kills` times at random moments after random steps, then lets it end."""
    rng = random.Random(seed)
    for _ in range(kills):
        child = launch(run)
        done = max((line["step"] for line in read_metrics(run)), default=0)
        wait_for_step(child, min(STEPS - 1, done + rng.randint(0, 4)))
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
    return finish(launch(run))[0]


def test_killed_three_times_the_run_ends_with_the_same_bits(launch, undisturbed: str, tmp_path: Path) -> None:
    assert kill_and_resume(launch, tmp_path / "run", seed=1, kills=3) == undisturbed
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))  # no step logged twice


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 14))
def test_killed_often(launch, undisturbed: str, tmp_path: Path, seed: int) -> None:
    assert kill_and_resume(launch, tmp_path / "run", seed=seed, kills=5) == undisturbed


def test_sigterm_saves_and_the_run_goes_on(launch, undisturbed: str, tmp_path: Path, record) -> None:
    run = tmp_path / "run"
    child = launch(run)
    wait_for_step(child, 5)
    asked = time.monotonic()
    child.process.send_signal(signal.SIGTERM)
    assert child.wait() == 0, child.report
    record("seconds from SIGTERM to the end of the process", time.monotonic() - asked)
    stopped = int(child.out.splitlines()[-1].split()[1])
    assert 5 <= stopped < STEPS
    assert (run / "checkpoints" / str(stopped)).is_dir()
    assert f"saved step {stopped} of {STEPS}" in child.out
    assert finish(launch(run))[0] == undisturbed


@pytest.fixture(scope="module")
def six_steps(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("six") / "run"
    finish(launch(run, steps=6))
    return run


@pytest.mark.parametrize(
    "damage", ["flipped", pytest.param("cut", marks=pytest.mark.soak), pytest.param("gone", marks=pytest.mark.soak)]
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    launch, undisturbed: str, six_steps: Path, tmp_path: Path, damage: str
) -> None:
    run = shutil.copytree(six_steps, tmp_path / "run")
    newest = run / "checkpoints" / "6"
    data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    if damage == "flipped":
        middle = len(content) // 2
        data.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "cut":
        data.write_bytes(content[: len(content) // 2])
    else:
        (newest / "loop").rename(tmp_path / "loop")
    line, errors = finish(launch(run))
    assert "checkpoint of step 6 is damaged" in errors and "resumed from the checkpoint of step 4" in errors
    assert (run / "damaged_checkpoints" / "6.0").is_dir()
    assert line == undisturbed


def test_all_checkpoints_damaged_is_an_error_not_a_new_start(launch, six_steps: Path, tmp_path: Path) -> None:
    run = shutil.copytree(six_steps, tmp_path / "run")
    for step in (2, 4, 6):
        (run / "checkpoints" / str(step) / "loop").rename(tmp_path / str(step))
    child = launch(run)
    assert child.wait() == 1 and "all 3 checkpoints are damaged" in child.errors, child.report
