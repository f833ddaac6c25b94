"""Do two directories hold the same model? Every tensor's bits are compared, in blocks, and recorded checksums with the files."""

from __future__ import annotations

import filecmp
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.directories import find_side_files
from convert.hf2jax import checksums
from convert.progress import Progress, human_bytes
from convert.tensor_blocks import tensor_blocks
from qvlmoe_jax.checkpoint import ConvertedWeights, Weights, open_weights
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import LM_HEAD_KEY, Row, expand
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.param_tree import check_shapes

SHOWN = 5


def verify(source: str | Path, destination: str | Path, *, report: Callable[[str], None] = lambda line: None) -> None:
    """Compares two model directories of any kinds, tensor by tensor, side file by side file.

    Where their dtypes differ, the source's numbers cast to the destination's dtype are expected.

    Raises:
      CheckpointError: they are not the same model; names what differs.
      ConfigError: a config.json is refused.
    """
    start = time.monotonic()
    source, destination = Path(source), Path(destination)
    here, there = open_weights(source), open_weights(destination)
    check_shapes(str(destination), here.shapes, there.shapes)
    faults = [*_side_files(here, there), *_checksums(here, there, report), *_tied(here, there)]
    rows = expand(here.config)
    cast: set[tuple[str, str]] = set()
    total = sum(math.prod(row.hf_shape) * there.dtypes[row.path].itemsize for row in rows)
    with Progress(total, report) as progress:
        for row in rows:
            dtype, original = there.dtypes[row.path], here.dtypes[row.path]
            if dtype != original:
                cast.add((original.name, dtype.name))
            fault = _compare(here, there, row, dtype)
            if fault:
                faults.append(fault)
            progress.add(math.prod(row.hf_shape) * dtype.itemsize)
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CheckpointError(f"{source} and {destination} differ: {'; '.join(faults[:SHOWN])}{more}; convert again")
    how = "bit for bit" if not cast else "after the cast " + ", ".join(f"{a} -> {b}" for a, b in sorted(cast))
    seconds = time.monotonic() - start
    report(
        f"verified: {len(rows)} tensors, {sum(map(math.prod, here.shapes.values())):,} parameters, {total:,} bytes equal {how}, "
        f"{seconds:.1f} seconds ({human_bytes(total / seconds)}/s)"
    )


def _compare(here: Weights, there: Weights, row: Row, dtype: np.dtype) -> str | None:
    """What differs in one tensor, or None."""
    done, different, first = 0, 0, ""
    for a, b in zip(tensor_blocks(here, row, dtype), tensor_blocks(there, row, dtype), strict=True):
        bits = np.dtype(f"u{dtype.itemsize}")
        unequal = np.flatnonzero(a.reshape(-1).view(bits) != b.reshape(-1).view(bits))
        if unequal.size and not different:
            at = int(unequal[0])
            place = [int(i) for i in np.unravel_index(done + at, row.hf_shape)]
            first = f"first at {place}: {a.reshape(-1)[at]} and {b.reshape(-1)[at]}"
        different += unequal.size
        done += a.size
    return f"{row.key!r} in {different} of {done} numbers, {first}" if different else None


def _side_files(here: Weights, there: Weights) -> list[str]:
    """Side files that only one has, or that differ. A cast changes the dtype in config.json, so then its text may differ."""
    a, b = here.side_directory, there.side_directory
    cast = here.dtypes != there.dtypes
    faults = []
    for name in sorted({*find_side_files(a), *find_side_files(b)}):
        if not (a / name).exists() or not (b / name).exists():
            faults.append(f"{name} is only in {a if (a / name).exists() else b}")
        elif not filecmp.cmp(a / name, b / name, shallow=False) and not (name == "config.json" and cast):
            faults.append(f"{name} has other contents")
    return faults


def _checksums(here: Weights, there: Weights, report: Callable[[str], None]) -> list[str]:
    """Tensors of a Hugging Face side whose bytes are not those that the other side's conversion.json recorded."""
    files = next((side for side in (here, there) if isinstance(side, HFWeights)), None)
    record = next((side.conversion for side in (here, there) if isinstance(side, ConvertedWeights)), None)
    if files is None or record is None:
        return []
    recorded = {**record.get("tensors", {}), **record.get("scales", {})}
    dtypes = {files.files.tensors[name].dtype for name in files.match.names.values()}
    if {row.key for row in files.match.rows} - recorded.keys() or record.get("expert_layout") != files.match.expert_layout:
        return []  # the other layout of the experts: other bytes, equal numbers
    if record.get("dtype") != "keep" and files is there and len(dtypes) == 1:
        return []  # written after a cast
    report("checking the checksums of conversion.json")
    faults = []
    for row in files.match.rows:
        for name, found in checksums(files, (row,)).items():
            expected = recorded.get(name, {}).get("crc32")  # none of a scale: the conversion was of another checkpoint
            if found != expected:
                faults.append(f"{name!r} has checksum {found}, recorded {expected}")
    return faults


def _tied(here: Weights, there: Weights) -> list[str]:
    """A tied model's duplicate head must be kept."""
    states = []
    for side in (here, there):
        if isinstance(side, HFWeights):
            states.append(side.match.tied_lm_head)
        elif isinstance(side, ConvertedWeights):
            states.append(bool(side.conversion.get("tied_lm_head")))
    return [f"only one of them has the duplicate {LM_HEAD_KEY!r}"] if len(set(states)) > 1 else []
