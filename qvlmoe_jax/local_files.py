"""Which files of a model directory may be read, and JSON among them. A directory comes from outside: nothing in it is believed.

A symbolic link is followed if it stays inside the directory, or, where the directory is a hub cache's `snapshots/REVISION`, if it
ends in the sibling `blobs`, which is how that cache is laid out. So no downloaded index or link can make another file of the
machine be read. Pipes and devices, whose reading may never end, are no files here.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from qvlmoe_jax.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000
"""The released models' largest JSON files, their tokenizers aside, are an index of 150 kB and an Orbax `_METADATA` of 60 kB."""


def _allowed(root: Path) -> list[Path]:
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]


def _resolve(path: Path, allowed: list[Path]) -> Path:
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that no file system has
        raise CheckpointError(f"{path}: cannot be resolved ({error}), expected a regular file") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: a link to {target}, outside the directory; expected a file inside it, copy it there")
    return target


def local_file(directory: Path, name: str) -> Path:
    """`directory/name`, once it is known to stay inside by the rule above.

    Raises:
      CheckpointError: `name` is not a plain relative path, the link escapes, or no regular file is there.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
        raise CheckpointError(f"{directory}: file name {name!r} points outside the directory, expected a name inside it")
    path = directory / name
    target = _resolve(path, _allowed(directory.resolve()))
    if not os.path.isfile(target):  # unlike Path.is_file, it takes a name that is too long for one that is not there
        raise CheckpointError(f"{path}: not found, expected a regular file; download it again")
    return path


def check_tree(directory: Path, largest: int) -> None:
    """Everything below `directory` is a regular file or a folder, no link leaves it, and no file is larger than `largest` bytes.

    (Whole files are read into memory by libraries that end the process where it does not suffice.)

    Raises:
      CheckpointError: names what is not so.
    """
    allowed = _allowed(directory.resolve())
    folders = [directory]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                path, target = Path(entry.path), Path(entry.path)
                if entry.is_symlink():
                    target = _resolve(path, allowed)
                elif entry.is_dir():
                    folders.append(path)
                if target.is_dir():
                    continue
                if not os.path.isfile(target):
                    raise CheckpointError(f"{path}: no file, or a pipe or device; expected a regular file, copy it again")
                size = target.stat().st_size
                if size > (MAX_JSON_BYTES if path.suffix == ".json" else largest):
                    raise CheckpointError(f"{path}: {size:,} bytes, more than the whole model has; copy it again")


def parse_json(text: bytes, what: str) -> Any:
    """JSON in which a key may not come twice (Python keeps the last one silently).

    Raises:
      CheckpointError: `what` (a file, a header) is not JSON or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{what}: key {twice!r} appears twice, expected every key once")
        return out

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON ({error}); the file is damaged, download it again") from None


def read_json(path: Path) -> Any:
    """`parse_json` of a file.

    Raises:
      CheckpointError: no regular file is there, or it is too large to be what it should.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not found, expected a regular file; download it again")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes of JSON, expected at most {MAX_JSON_BYTES:,}; the file is damaged")
    return parse_json(path.read_bytes(), str(path))
