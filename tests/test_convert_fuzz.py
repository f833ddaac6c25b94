"""Whatever a directory holds: converted, or refused in one line. No traceback, hang, flood of memory or half result."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest

from convert.__main__ import main
from tests import fuzz_mutations as mutations
from tests import tiny
from tests.fp8_checkpoints import fp8_config, quantise
from tests.hf_checkpoints import random_hf_tensors, split_experts, write_hf_checkpoint

ROOT = Path(__file__).parents[1]
PEAK = 1 << 30
"""Of resident memory. jax and Orbax take some 300 MB of it; the models are of one megabyte."""

Run = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command line, or ("load", directory), in a child of one warm process."""
    log = tmp_path_factory.mktemp("log")
    command = [sys.executable, "-m", "tests.fuzz_runner"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"

        def ask(argv: list[str]) -> dict[str, Any]:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps({"argv": argv, "log": str(log)}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every kind, and `jax`, a converted one."""
    place = tmp_path_factory.mktemp("good")
    tensors = random_hf_tensors(tiny.TINY, dtype=ml_dtypes.bfloat16)
    block = (16, 16)
    write_hf_checkpoint(place / "sharded", tiny.TINY, tensors, shards=3)
    write_hf_checkpoint(place / "single", tiny.TIED, random_hf_tensors(tiny.TIED, layout="v5"))
    write_hf_checkpoint(place / "per_expert", tiny.TINY, split_experts(tensors), shards=2)
    write_hf_checkpoint(place / "fp8", fp8_config(tiny.TINY, block), quantise(tensors, block))
    for directory in place.iterdir():
        (directory / "tokenizer.json").write_text("{}")
    assert main(["hf2jax", str(place / "sharded"), str(place / "jax")]) == 0
    return place


def check(run: Run, argv: list[str], destination: Path | None, *, refused: bool) -> int:
    """Runs it and holds it to the rules. Returns the exit status."""
    result = run(argv)
    status, err = result["status"], result["err"]
    assert status in (0, 2), (status, err)
    assert result["peak"] < PEAK, (result["peak"], err)
    if status:
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: "), err
        assert err.isprintable() or err[:-1].isprintable(), ascii(err)
    assert not (refused and status == 0), "accepted"
    if destination is not None:
        left = [path.name for path in destination.parent.glob(f"{destination.name}*")]
        assert left == ([] if status else [destination.name])
    return status


def one_case(seed: int, run: Run, good: Path, place: Path) -> str:
    """Damages one directory in one to three ways and gives it to the commands. Returns what was done."""
    rng = random.Random(seed)
    source, destination = place / "model", place / "new"
    if converted := rng.random() < 0.4:
        kind, kinds = "jax", mutations.CONVERTED
    else:
        kind = rng.choice(["sharded", "sharded", "single", "per_expert", "fp8"])
        kinds = mutations.HF | (mutations.SHARDED if kind in ("sharded", "per_expert") else {})
    shutil.copytree(good / kind, source)
    done, refused = [kind], False
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(sorted(kinds))
        done.append(name)
        try:
            refused |= bool(kinds[name](rng, source))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
            break  # what it wanted to change has been changed already
    print(f"seed {seed}: {', '.join(done)}")
    if converted:
        status = check(run, ["jax2hf", str(source), str(destination)], destination, refused=refused)
        check(run, ["load", str(source)], None, refused=refused)
        other = [str(good / "sharded"), str(source)]
    else:
        flags = rng.choice([["--dtype", "float32"], ["--dtype", "bfloat16"], []])
        refused |= kind == "fp8" and not flags
        status = check(run, ["hf2jax", str(source), str(destination), *flags], destination, refused=refused)
        other = [str(source), str(destination if not status else good / "jax")]
    check(run, ["inspect", str(source)], None, refused=False)
    if rng.random() < 0.3 or not status:
        check(run, ["verify", *other], None, refused=False)
    return ", ".join(done)


SHARE = 5


@pytest.mark.parametrize("first", range(0, 50, SHARE))
def test_damaged_directories(first: int, run: Run, good: Path, tmp_path: Path) -> None:
    for seed in range(first, first + SHARE):
        one_case(seed, run, good, tmp_path / str(seed))
        shutil.rmtree(tmp_path / str(seed))


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1000, 1600, 50))
def test_many_damaged_directories(first: int, run: Run, good: Path, tmp_path: Path) -> None:
    for seed in range(first, first + 50):
        one_case(seed, run, good, tmp_path / str(seed))
        shutil.rmtree(tmp_path / str(seed))


def test_the_undamaged_ones_are_accepted(run: Run, good: Path, tmp_path: Path) -> None:
    for kind in ("sharded", "single", "per_expert", "fp8"):
        argv = ["hf2jax", str(good / kind), str(tmp_path / kind), "--dtype", "float32"]
        assert check(run, argv, tmp_path / kind, refused=False) == 0
    assert check(run, ["jax2hf", str(good / "jax"), str(tmp_path / "hf")], tmp_path / "hf", refused=False) == 0
    assert check(run, ["load", str(good / "jax")], None, refused=False) == 0
    assert check(run, ["verify", str(good / "sharded"), str(good / "jax")], None, refused=False) == 0
