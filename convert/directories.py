"""What may be read and written where: sources by path or hub name, destinations, side files."""

from __future__ import annotations

import re
from pathlib import Path

from qvlmoe_jax.checkpoint import CONVERSION_FILE
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.local_files import local_file

SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
SIDE_NAMES = ("LICENSE", "NOTICE", "README")
HUB_PATTERNS = ["*.safetensors", *(f"*{suffix}" for suffix in SIDE_SUFFIXES), *(f"{name}*" for name in SIDE_NAMES)]


def find_source(source: str) -> Path:
    """A directory, or the snapshot of a hub repository (`ORG/NAME`), downloaded first if it is not in the hub's cache.

    Raises:
      CheckpointError: neither is there, or the hub cannot be reached.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source):
        return path
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise CheckpointError(
            f"{source}: no such directory, and the hub repository of that name is not in the cache while this machine is offline "
            f"({why}); give a directory, or go online and try again"
        ) from error
    except Exception as error:  # its other errors, the network library's, the file system's
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: no such directory, and the hub repository of that name cannot be downloaded ({reason}); "
            "give a directory, or go online and try again"
        ) from error


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
