"""Directories that appear by one rename: one that exists is whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvlmoe_jax.errors import CheckpointError


def _remove(path: Path) -> None:
    """Removes a tree that a writer's background threads may still be filling for a moment after an interrupt."""
    for _ in range(50):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(path)


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
    staging, replaced = (destination.with_name(destination.name + end) for end in (suffix, ".replaced"))
    if overwrite and replaced.exists():
        raise CheckpointError(
            f"{replaced}: left over from a run that was killed while replacing {destination.name}; expected no such directory, "
            f"remove it, or rename it back if {destination.name} is missing"
        )
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
        if overwrite and destination.exists():
            destination.rename(replaced)
            try:
                staging.rename(destination)
            except BaseException:
                replaced.rename(destination)
                raise
            _remove(replaced)
        else:
            os.rename(staging, destination)
    except BaseException:
        _remove(staging)
        raise
