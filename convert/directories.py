"""What may be read and written where: destinations, side files."""

from __future__ import annotations

from pathlib import Path

from qvlmoe_jax.checkpoint import CONVERSION_FILE
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hub import SIDE_NAMES, SIDE_SUFFIXES
from qvlmoe_jax.local_files import local_file


def check_destination(source: Path, destination: Path, overwrite: bool | None = None) -> None:
    """Refuses a destination that writing would harm. `overwrite` None: the command has no such flag.

    Raises:
      CheckpointError: one directory is inside the other, or the destination exists (with `overwrite`: and is neither empty nor
        one of ours).
    """
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer:
        raise CheckpointError(f"{destination}: SRC and DST are the same directory, expected another DST")
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise CheckpointError(f"{destination}: one of SRC and DST is inside the other, expected a DST beside {source}")
    if not inner.exists():
        return
    if not overwrite:
        remedy = "name another" if overwrite is None else "give --overwrite"
        raise CheckpointError(f"{destination}: exists, expected a new directory; remove it or {remedy}")
    ours = inner.is_dir() and ((inner / CONVERSION_FILE).is_file() or not any(inner.iterdir()))
    if not ours:
        raise CheckpointError(f"{destination}: not a converted directory, expected one for --overwrite; remove it yourself")


def find_side_files(source: Path) -> list[str]:
    """Names of config, tokenizer, processor and generation files, templates, licence: what a model needs beside its weights.

    Raises:
      CheckpointError: one of them is a link out of the directory.
    """
    names = [
        path.name
        for path in sorted(source.iterdir())
        if (path.suffix in SIDE_SUFFIXES or path.name.split(".")[0].upper() in SIDE_NAMES)
        and not path.name.endswith(".index.json")
        and path.name != CONVERSION_FILE
        and not path.is_dir()
    ]
    for name in names:
        local_file(source, name)
    return names


def describe_source(source: Path) -> dict[str, str | None]:
    """The directory's name; in a hub cache (`models--ORG--NAME/snapshots/REVISION`) the repository and its revision."""
    cache = source.parent.parent
    if source.parent.name == "snapshots" and cache.name.startswith("models--"):
        return {"name": cache.name.removeprefix("models--").replace("--", "/"), "revision": source.name}
    return {"name": source.name, "revision": None}
