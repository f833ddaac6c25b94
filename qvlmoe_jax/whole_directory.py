"""Directories that appear by one rename: one that exists is whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvlmoe_jax.errors import CheckpointError

REPLACED = ".replaced"


def _remove(path: Path) -> None:
    """Removes a tree that a writer's background threads may still be filling for a moment after an interrupt."""
    for _ in range(50):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(path)


def check_replaced(destination: Path) -> None:
    """Refuses to begin where an earlier `replace_directory` was killed between its two renames.

    Raises:
      CheckpointError: names the directory it left.
    """
    replaced = destination.with_name(destination.name + REPLACED)
    if replaced.exists():
        raise CheckpointError(
            f"{replaced}: left over from a run that was killed while replacing {destination.name}; expected no such directory, "
            f"remove it, or rename it back if {destination.name} is missing"
        )


def replace_directory(staging: Path, destination: Path) -> None:
    """Renames `staging` to `destination`, which may exist: it is moved away first and removed once the new one is there."""
    if not destination.exists():
        os.rename(staging, destination)
        return
    replaced = destination.with_name(destination.name + REPLACED)
    destination.rename(replaced)
    try:
        staging.rename(destination)
    except BaseException:
        replaced.rename(destination)
        raise
    _remove(replaced)


@contextmanager
def whole_directory(destination: Path, *, suffix: str, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty directory to fill, and renames it to `destination` if the body finishes; otherwise removes it.

    Args:
      destination: absent or empty, or with `overwrite` any directory, which stays untouched until the new one is whole.
      suffix: appended to `destination` while it is being filled.
    Raises:
      CheckpointError: an earlier run was killed and its unfinished directory is still there. It is left for the user to judge.
    """
    destination = destination.resolve()
    staging = destination.with_name(destination.name + suffix)
    if overwrite:
        check_replaced(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{staging}: left over from a run that was killed, or another run is writing it; expected no such directory, "
            "remove it if nothing is running"
        ) from None
    try:
        yield staging
        os.sync()  # a rename must not outlive what it names
        if overwrite:
            replace_directory(staging, destination)
        else:
            os.rename(staging, destination)
    except BaseException:
        _remove(staging)
        raise
