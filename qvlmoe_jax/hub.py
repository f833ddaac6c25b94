"""Models by the name of their hub repository (`ORG/NAME`), and what is downloaded of one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qvlmoe_jax.errors import CheckpointError

SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
SIDE_NAMES = ("LICENSE", "NOTICE", "README")
"""Files that a model needs beside its weights."""
HUB_PATTERNS = ["*.safetensors", *(f"*{suffix}" for suffix in SIDE_SUFFIXES), *(f"{name}*" for name in SIDE_NAMES)]


def find_source(source: str | os.PathLike[str]) -> Path:
    """A directory, or the snapshot of a hub repository (`ORG/NAME`), downloaded first if it is not in the hub's cache.

    Raises:
      CheckpointError: neither is there, or the hub cannot be reached.
    """
    path, name = Path(source), str(source)
    if path.exists() or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        return path
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise CheckpointError(
            f"{name}: no such directory, and the hub repository of that name is not in the cache while this machine is offline "
            f"({why}); give a directory, or go online and try again"
        ) from error
    except Exception as error:  # its other errors, the network library's, the file system's
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such directory, and the hub repository of that name cannot be downloaded ({reason}); "
            "give a directory, or go online and try again"
        ) from error
