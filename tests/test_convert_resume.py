"""`hf2jax` killed at random moments, on a full disk, and shared among processes: the same bytes in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, snapshot, write_hf_checkpoint

ROOT = Path(__file__).parents[1]
BF16 = ml_dtypes.bfloat16
# large enough that writing takes about a second, so that kills land in every phase of it
BIGGER = tiny.variant(
    tiny.TINY,
    text_config={
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_experts": 16,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 10,
    },
    vision_config={"out_hidden_size": 512},
)


NUM_FILES = 63


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    return write_hf_checkpoint(directory / "hf", BIGGER, random_hf_tensors(BIGGER, dtype=BF16), shards=3)


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """Every file of an uninterrupted conversion; Orbax's own mark of the time is left out."""
    destination = source.parent / "whole"
    assert main(["hf2jax", str(source), str(destination)]) == 0
    return contents(destination)


def contents(directory: Path) -> dict[str, bytes]:
    timed = ("_CHECKPOINT_METADATA", "commit_success.txt")
    return {name: data for name, data in snapshot(directory).items() if not name.endswith(timed)}


def command(source: Path, destination: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "convert", "hf2jax", str(source), str(destination), *flags]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def files_written(work: Path) -> int:
    return sum(len(files) for folder, _, files in os.walk(work / "result") if "/c" in folder)


def kill_and_resume(source: Path, destination: Path, rng: random.Random, kills: int) -> list[int]:
    """Kills runs one after another: the first as it begins, the others at a random number of files, until one finishes.

    Returns how many files there were at each kill.
    """
    killed = []
    work = destination.with_name(destination.name + ".converting")
    for attempt in range(kills):
        process = subprocess.Popen(command(source, destination, "--resume"), cwd=ROOT, stdout=subprocess.DEVNULL)
        enough = rng.randint(1, NUM_FILES - 5) if attempt else 0
        while process.poll() is None and (not work.exists() or files_written(work) < enough):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(files_written(work))
        process.wait()
        assert not (destination.exists() and work.joinpath("result").exists())
        if process.returncode == 0:
            break
    if not destination.exists():
        done = run(*command(source, destination, "--resume"))
        assert done.returncode == 0, done.stderr
    return killed


def check_killed(source: Path, whole: dict[str, bytes], tmp_path: Path, *, seed: int, kills: int) -> None:
    destination = tmp_path / f"jax{seed}"
    assert NUM_FILES == sum("/c/" in name for name in whole)
    killed = kill_and_resume(source, destination, random.Random(seed), kills)
    assert len(killed) > 1 and killed[-1] > 0, killed
    assert contents(destination) == whole
    assert not destination.with_name(destination.name + ".converting").exists()


def test_killed_and_resumed_gives_the_same_bytes(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    check_killed(source, whole, tmp_path, seed=0, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 8))
def test_killed_many_times(seed: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    check_killed(source, whole, tmp_path, seed=seed, kills=3)


@pytest.mark.parametrize("workers", [2, 4])
def test_several_processes_give_the_same_bytes(workers: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    destination = tmp_path / "jax"
    processes = [
        subprocess.Popen(command(source, destination, "--worker", str(i), "--workers", str(workers)), cwd=ROOT)
        for i in range(workers)
    ]
    assert [process.wait(120) for process in processes] == [0] * workers
    assert contents(destination) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["jax"]


def test_one_worker_after_another_and_one_of_them_killed(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    destination = tmp_path / "jax"
    flags = ["--workers", "2", "--worker"]
    assert main(["hf2jax", str(source), str(destination), *flags, "0"]) == 0
    assert not destination.exists()
    process = subprocess.Popen(command(source, destination, *flags, "1"), cwd=ROOT, stdout=subprocess.DEVNULL)
    journal = destination.with_name("jax.converting") / "worker-1.jsonl"
    while not journal.exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    if not destination.exists():
        assert main(["hf2jax", str(source), str(destination), *flags, "1"]) == 2
        assert main(["hf2jax", str(source), str(destination), *flags, "1", "--resume"]) == 0
    assert contents(destination) == whole


@pytest.fixture(params=["size=24m", "size=24m,nr_inodes=60", "size=3m", "size=1m"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system too small for the whole, for its files' number, for most of it, for its beginning. Root may enlarge it."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or run("mount", "-t", "tmpfs", "-o", request.param, "tmpfs", place).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    run("umount", place)


def test_a_full_disk_is_one_line_and_resumes(source: Path, whole: dict[str, bytes], small_disk: Path) -> None:
    destination = small_disk / "jax"
    done = run(*command(source, destination))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device" in done.stderr
    assert "--resume" in done.stderr
    assert not destination.exists()
    assert run("mount", "-o", "remount,size=200m,nr_inodes=9999", small_disk).returncode == 0
    done = run(*command(source, destination, "--resume"))
    assert done.returncode == 0, done.stderr
    assert contents(destination) == whole


@pytest.mark.parametrize("change", ["source", "other", "dtype", "table", "workers"])
def test_another_conversion_is_not_resumed(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = write_hf_checkpoint(tmp_path / "hf", tiny.TINY, random_hf_tensors(tiny.TINY, dtype=BF16))
    destination = tmp_path / "jax"
    flags = ["--workers", "2", "--worker", "0"]
    assert main(["hf2jax", str(hf), str(destination), *flags]) == 0
    before = snapshot(tmp_path / "jax.converting")
    if change == "source":  # one number, in place
        file = hf / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        time.sleep(0.01)
        file.write_bytes(data)
    elif change == "other":
        hf = write_hf_checkpoint(tmp_path / "hf2", tiny.TINY, random_hf_tensors(tiny.TINY, dtype=BF16, seed=1))
    elif change == "dtype":
        flags += ["--dtype", "float32"]
    elif change == "table":
        plan = tmp_path / "jax.converting" / "plan.json"
        plan.write_text(json.dumps(json.loads(plan.read_text()) | {"table_version": 0}))
        before = snapshot(tmp_path / "jax.converting")
    else:
        flags[1] = "3"
    capsys.readouterr()
    assert main(["hf2jax", str(hf), str(destination), *flags, "--resume"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "cannot go on with it" in err
    assert snapshot(tmp_path / "jax.converting") == before


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Twice the layers of 50 MB each, the same anonymous memory."""
    peaks = []
    for layers in (4, 8):
        text = {"num_hidden_layers": layers, "hidden_size": 1024, "num_experts": 16, "moe_intermediate_size": 512}
        config = tiny.variant(tiny.UNIFORM, text_config=text, vision_config={"out_hidden_size": 1024})
        tensors = random_hf_tensors(config, dtype=BF16)
        source = write_hf_checkpoint(tmp_path / f"hf{layers}", config, tensors)
        del tensors
        done = run(*command(source, tmp_path / f"jax{layers}"))
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split("peak anonymous memory ")[1].split()[0]))
    assert peaks[1] < 1000  # MB
    assert peaks[1] < 1.15 * peaks[0], peaks


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_contents_see_a_changed_byte(whole: dict[str, bytes]) -> None:
    """The comparisons above compare all files, data included."""
    assert sum(map(len, whole.values())) > 2 * np.prod([9 - 1, 16, 512, 2 * 256])
