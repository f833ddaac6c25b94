"""Hugging Face directory -> converted directory: config and side files as they are, `conversion.json`, Orbax `checkpoint/`."""

from __future__ import annotations

import json
import math
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qvlmoe_jax.checkpoint import CHECKPOINT_DIR, CONVERSION_FILE, load_tree
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import LM_HEAD_KEY, TABLE_VERSION
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.param_tree import nest
from qvlmoe_jax.safetensors_io import DTYPE_NAMES
from qvlmoe_jax.shards import local_file
from qvlmoe_jax.whole_directory import whole_directory

FORMAT = "qvlmoe_jax.conversion"
FORMAT_VERSION = 1
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
SIDE_NAMES = ("LICENSE", "NOTICE", "README")


def hf2jax(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Converts `source` into the new directory `destination`, which appears by one rename.

    Args:
      source: a Hugging Face checkpoint directory, in either expert layout.
      dtype: of the stored parameters.
      overwrite: replace an existing converted directory once the new one is whole.
      report: takes each line of progress.
    Raises:
      CheckpointError, ConfigError: before anything is written, if either directory is not as expected.
    """
    start = time.monotonic()
    source, destination = Path(source), Path(destination)
    check_destination(source, destination, overwrite)
    weights = open_source(source)
    side_files = find_side_files(source)
    tensors = weights.files.tensors
    size = sum(info.nbytes for info in tensors.values())
    layout = f", {weights.match.expert_layout} expert layout" if weights.match.expert_layout else ""
    report(f"{source}: {len(tensors)} tensors in {len(weights.files.files)} files, {size:,} bytes{layout}")

    with whole_directory(destination, suffix=".converting", overwrite=overwrite) as staging:
        for name in side_files:
            shutil.copyfile(source / name, staging / name)
        record = conversion_record(weights, source, dtype)
        (staging / CONVERSION_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        report(f"{CONVERSION_FILE} and {len(side_files)} side files written")
        write_checkpoint(weights, staging / CHECKPOINT_DIR, None if dtype == "keep" else np.dtype(dtype))
    parameters, seconds = sum(map(math.prod, weights.shapes.values())), time.monotonic() - start
    report(f"{destination}: {len(tensors)} tensors, {parameters:,} parameters, {size:,} bytes read, {seconds:.1f} seconds")


def open_source(source: Path) -> HFWeights:
    """The checkpoint, wholly checked.

    Raises:
      CheckpointError, ConfigError: what is wrong with it, by file or key.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: not a directory, expected a Hugging Face checkpoint (config.json and safetensors)")
    if (source / CONVERSION_FILE).exists():
        raise CheckpointError(f"{source}: already a converted directory, expected a Hugging Face checkpoint")
    return HFWeights(source)


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuses a destination that writing would harm.

    Raises:
      CheckpointError: one directory is inside the other, or the destination exists (with `overwrite`: and is neither empty nor a
        converted directory).
    """
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer:
        raise CheckpointError(f"{destination}: SRC and DST are the same directory, expected another DST")
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise CheckpointError(f"{destination}: one of SRC and DST is inside the other, expected a DST beside {source}")
    if not inner.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{destination}: exists, expected a new directory; remove it or give --overwrite")
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
        and not path.is_dir()
    ]
    for name in names:
        local_file(source, name)
    return names


def conversion_record(weights: HFWeights, source: Path, dtype: str) -> dict[str, Any]:
    """`conversion.json`: what is needed to verify the conversion and to write the same files back.

    The checksum is CRC-32 of a tensor's bytes on disk. It is there to find damage; the standard library does it four times as
    fast as blake2b.
    """

    def entry(key: str) -> dict[str, Any]:
        info = weights.files.tensors[key]
        crc = zlib.crc32(weights.files.array(key).reshape(-1).view(np.uint8).data)
        return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "crc32": f"{crc:08x}"}

    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "table_version": TABLE_VERSION,
        "source": describe_source(source.resolve()),
        "expert_layout": weights.match.expert_layout,
        "dtype": dtype,
        "tied_lm_head": entry(LM_HEAD_KEY) if weights.match.tied_lm_head else None,
        "tensors": {row.key: entry(row.key) for row in weights.match.rows},
    }


def describe_source(source: Path) -> dict[str, str | None]:
    """The directory's name; in a hub cache (`models--ORG--NAME/snapshots/REVISION`) the repository and its revision."""
    cache = source.parent.parent
    if source.parent.name == "snapshots" and cache.name.startswith("models--"):
        return {"name": cache.name.removeprefix("models--").replace("--", "/"), "revision": source.name}
    return {"name": source.name, "revision": None}


def write_checkpoint(weights: HFWeights, path: Path, dtype: np.dtype | None) -> None:
    """Stacks the parameters in host memory and saves them with Orbax, as a pytree of plain dicts at `path`."""
    import jax
    from orbax.checkpoint import v1 as ocp

    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    target = {
        name: jax.ShapeDtypeStruct(shape, weights.dtypes[name] if dtype is None else dtype, sharding=host)
        for name, shape in weights.shapes.items()
    }
    ocp.save(str(path.resolve()), load_tree(weights, nest(target)))
