"""`DST.converting`: a conversion in the making, which a killed run leaves and `--resume` goes on with.

It holds the growing `result/`, `plan.json` (what is being made from what), and for each worker a lock, a journal of finished
units with their checksums, and a mark that it is done. The last worker to finish renames `result/` to DST and removes the rest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.zarr_file import PART_SUFFIX
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import naming, write_text
from qvlmoe_jax.whole_directory import replace_directory

SUFFIX = ".converting"
RESULT = "result"
PLAN = "plan.json"

Plan = Mapping[str, Any]


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock that the system drops if this process dies; gives False if another one has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class WorkDirectory:
    """One worker's hold on `DST.converting`.

    Attributes:
      path: the directory.
      result: what will be DST.
      finished: unit name -> checksums of its tensors, of the units that this worker has journalled since the machine was started.
        (What was written before that may not have reached the disk, and is written again.)
    """

    def __init__(self, path: Path, worker: int, workers: int):
        self.path, self.worker, self.workers = path, worker, workers
        self.result = path / RESULT
        self._journal = path / f"worker-{worker}.jsonl"
        self._boot = _boot_id()
        self.finished = _read_journal(self._journal, self._boot)

    def record(self, unit: str, checksums: Mapping[str, str]) -> None:
        """Journals a unit whose files are all written."""
        with naming(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, "boot": self._boot, "crc32": checksums}) + "\n")
        self.finished[unit] = dict(checksums)

    def finish(self, destination: Path, complete: Callable[[dict[str, str]], None], *, overwrite: bool) -> bool:
        """Marks this worker done. The last one calls `complete` with all checksums, and gives the directory its name.

        Returns:
          whether this was the last worker.
        """
        (self.path / f"worker-{self.worker}.done").touch()
        try:
            with _locked(self.path / "finish.lock", wait=True):
                if not all((self.path / f"worker-{i}.done").exists() for i in range(self.workers)):
                    return False
                checksums: dict[str, str] = {}
                for i in range(self.workers):
                    for unit in _read_journal(self.path / f"worker-{i}.jsonl").values():
                        checksums.update(unit)
                complete(checksums)
                for pattern in ("*.__lock", f"*{PART_SUFFIX}"):  # TensorStore's and our own, of writes that were killed
                    for stray in self.result.rglob(pattern):
                        stray.unlink()
                os.sync()  # a rename must not outlive what it names
                if overwrite:
                    replace_directory(self.result, destination)
                else:
                    os.rename(self.result, destination)
                shutil.rmtree(self.path)
                return True
        except FileNotFoundError:
            if destination.exists() and not self.result.exists():
                return False  # the other one was quicker
            raise


def _boot_id() -> str:
    """Names the time since this machine was started; empty where the system has no name for it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _read_journal(path: Path, boot: str | None = None) -> dict[str, dict[str, str]]:
    """Unit -> checksums; with `boot`, of that boot only."""
    if not path.exists():
        return {}
    units = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        if boot is None or entry["boot"] == boot:
            units[entry["unit"]] = entry["crc32"]
    return units


@contextmanager
def open_work_directory(
    destination: Path,
    plan: Plan,
    begin: Callable[[Path], None],
    *,
    resume: bool,
    worker: int = 0,
    workers: int = 1,
) -> Iterator[WorkDirectory]:
    """Makes `DST.converting`, or goes on with the one that is there.

    Args:
      destination: DST, resolved.
      plan: what is being made from what; only a run with an equal plan may go on.
      begin: fills the new result directory with what all workers need.
    Raises:
      CheckpointError: it is there and `resume` is not asked for, belongs to another plan, or this worker is running already.
    """
    path = work_path(destination)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not resume and workers == 1:
        raise _left_over(path)
    path.mkdir(exist_ok=True)
    with _locked(path / f"worker-{worker}.lock", wait=False) as mine:
        if not mine:
            raise CheckpointError(f"{path}: worker {worker} is running already, expected no other process; wait for it")
        with _locked(path / "plan.lock", wait=True):
            if (path / PLAN).exists():
                _check_plan(path, json.loads((path / PLAN).read_text(encoding="utf-8")), plan)
            else:
                shutil.rmtree(path / RESULT, ignore_errors=True)  # of a beginning that was killed
                (path / RESULT).mkdir()
                begin(path / RESULT)
                write_text(path / "plan.new", json.dumps(plan, indent=1) + "\n")
                (path / "plan.new").rename(path / PLAN)
        if not resume and (path / f"worker-{worker}.jsonl").exists():
            raise _left_over(path)
        yield WorkDirectory(path, worker, workers)


@contextmanager
def telling_of_resume(path: Path) -> Iterator[None]:
    """A file that cannot be read or written inside is told with what to do, once there is a `DST.converting` to go on with.

    An error of no file (stdout) stays as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or not path.exists():
            raise
        room = "make room and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        raise OSError(f"{files}: {error.strerror}; {room}go on with --resume") from error


def work_path(destination: Path) -> Path:
    """Where DST is made."""
    return destination.with_name(destination.name + SUFFIX)


def only_cleaning_is_left(destination: Path) -> bool:
    """A run was killed after it gave DST its name, before it removed the rest."""
    path = work_path(destination)
    return destination.exists() and (path / PLAN).exists() and not (path / RESULT).exists()


def _left_over(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: left over from a run that was killed, or another run is writing it; give --resume to go on with it, "
        "or remove it if nothing is running"
    )


def _check_plan(path: Path, found: Plan, expected: Plan) -> None:
    for key, value in expected.items():
        if found.get(key) != value:
            was, now = (f"{x!r:.120}" for x in (found.get(key), value))
            raise CheckpointError(
                f"{path}: cannot go on with it: its {key} is {was}, now it is {now}; expected the same source, table version and "
                "options as the run that began it; remove it to begin again"
            )
