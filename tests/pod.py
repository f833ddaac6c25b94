"""Several real processes of one program on this machine, and the small run that the tests give them. Nothing waits for ever."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests import data_cases, tiny
from tests.xla_flags import SHARED_CORES

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 400.0
"""Seconds that one start of a program may take. A loaded machine compiles for a minute."""


def free_port() -> int:
    """One that nobody listens at, at this moment."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Child:
    """A process whose output is read as it comes. Every wait has an end: then the process is killed, and the test fails with its
    stacks and its output."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: tuple[list[str], list[str]] = ([], [])
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [
            threading.Thread(target=_read, args=pair, daemon=True) for pair in zip(streams, self._lines, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return "".join(self._lines[0])

    @property
    def errors(self) -> str:
        """Its standard error so far."""
        return "".join(self._lines[1])

    @property
    def report(self) -> str:
        """What there is to say of a failure."""
        return f"exit status {self.process.poll()}\n{self.out[-2000:]}\n{self.errors[-8000:]}"

    def wait(self, deadline: float = DEADLINE) -> int:
        """Its exit status; all output is there."""
        try:
            self.process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            self._give_up(f"still running after {deadline:.0f} s")
        for reader in self._readers:
            reader.join(10)
        return self.process.returncode

    def wait_for(self, pattern: str, deadline: float = DEADLINE) -> re.Match[str]:
        """Until a line of its standard output matches."""
        end, seen = time.monotonic() + deadline, 0
        while True:
            alive = self._readers[0].is_alive()
            for line in self._lines[0][seen:]:
                seen += 1
                if match := re.search(pattern, line):
                    return match
            assert alive, f"no line like {pattern!r}\n{self.report}"
            if time.monotonic() > end:
                self._give_up(f"no line like {pattern!r} after {deadline:.0f} s")
            time.sleep(0.02)

    def _give_up(self, why: str) -> None:
        self.process.send_signal(signal.SIGABRT)  # faulthandler prints every thread's stack
        time.sleep(2)
        self.kill()
        raise AssertionError(f"{why}\n{self.report}")

    def kill(self) -> None:
        """Ends it at once, whatever it does."""
        self.process.kill()
        self.process.wait(timeout=30)
        for reader in self._readers:
            reader.join(10)


def _read(stream: Any, lines: list[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line)


def environment(devices: int, cache: Path) -> dict[str, str]:
    """Of a process with so many CPU devices. What one process compiles the next finds in the cache."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # half the time to compile, for these runs are short
        "XLA_FLAGS": f"{SHARED_CORES} --xla_backend_optimization_level=0",
        "NPROC": "64",
    }


@contextmanager
def started(
    arguments: Sequence[str | Path],
    *,
    processes: int,
    devices: int,
    cache: Path,
    module: str = "train",
    last: Sequence[str] = (),
) -> Iterator[list[Child]]:
    """`python -m MODULE ARGUMENTS` in so many processes with so many devices each. All are dead when the block ends.

    Args:
      last: more arguments, of the last process alone.
    """
    command: list[str | Path] = [sys.executable, "-m", module, *arguments]
    children = []
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    try:
        for i in range(processes):
            own = {**where, "JAX_PROCESS_ID": str(i)} if processes > 1 else {}
            more = last if i == processes - 1 else ()
            children.append(Child([*command, *more], {**environment(devices, cache), **own}))
        yield children
    finally:
        for child in children:
            child.kill()


def run(arguments: Sequence[str | Path], *, processes: int, devices: int, cache: Path) -> list[Child]:
    """Runs to the end; each process must end with status 0."""
    with started(arguments, processes=processes, devices=devices, cache=cache) as children:
        statuses = [child.wait() for child in children]
        assert statuses == [0] * processes, "\n".join(child.report for child in children)
        return children


CONFIG = json.loads((data_cases.CHECKPOINT / "config.json").read_text(encoding="utf-8"))
SMALL = tiny.variant(
    CONFIG, text_config={"num_hidden_layers": 1}, vision_config={"depth": 1, "deepstack_visual_indexes": [0]}
)


def write_run(base: Path, *, steps: int, records: int = 150, **changes: Any) -> Path:
    """A config (8 groups, two microbatches of 8 rows, text and pictures) with its model and records; the run is `base/run`."""
    model = base / "model"
    shutil.copytree(data_cases.CHECKPOINT, model, ignore=shutil.ignore_patterns("*.safetensors", "*.png", "*.yaml", "heldout"))
    (model / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    (base / "p.png").write_bytes(data_cases.png(0))
    made = []
    for i in range(records):
        words = " ".join(["circle", "red", "no", "blue"][(i + j) % 4] for j in range(1 + i % 7))
        pictures = ["p.png"] * (i % 3 == 1)
        made.append(data_cases.picture_record(f"{i}?", words, *pictures))
        if i % 40 == 39:
            made.append({"text": "no turns here"})
    path = data_cases.write_jsonl(base / "records.jsonl", made)
    data = {"sources": [{"path": str(path)}], "sequence_length": 64, "batch_rows": 8, "vision_rows": 1, "row_patches": 64}
    tree = {
        "run": str(base / "run"),
        "steps": steps,
        "model": {"path": str(model), "from_scratch": True, "compute_dtype": "float32"},
        "data": {**data, "accumulation": 2},
        "loss": {"aux_loss": 0.01, "chunk_tokens": 64},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "constant"},
        "mesh": {"fsdp": 4, "expert": 2},
        "checkpoint": {"every": 2, "keep": 100, "export": False},
        "metrics": {"every": 1},
    }
    file = base / "config.yaml"
    file.write_text(yaml.safe_dump(tiny.variant(tree, **changes)), encoding="utf-8")
    return file
