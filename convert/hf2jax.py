"""Hugging Face directory -> converted directory: config and side files, `conversion.json`, Orbax `checkpoint/`, in little memory.

The parameters are cut into units: one tensor of a large parameter, or the whole stack of a small one. A unit is read from the
mapped safetensors files, checksummed, and written as its own files, so memory does not grow with the model, a killed run loses
the unit it was at, and any number of processes can share the units out.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.checksum import crc32
from convert.directories import check_destination, describe_source, find_side_files
from convert.orbax_stream import Leaf, LeafWriter, Piece, leaf_pieces, load_orbax, plan_leaves, write_skeleton
from convert.progress import Progress, human_bytes
from convert.work_directory import WorkDirectory, only_cleaning_is_left, open_work_directory, telling_of_resume, work_path
from qvlmoe_jax.checkpoint import CHECKPOINT_DIR, CONVERSION_FILE
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import copy_file, naming, write_text
from qvlmoe_jax.hf import LM_HEAD_KEY, TABLE_VERSION, Row
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.safetensors_io import DTYPE_NAMES
from qvlmoe_jax.whole_directory import check_replaced

FORMAT = "qvlmoe_jax.conversion"
FORMAT_VERSION = 2
SKELETON = "skeleton"
RESERVE, RESERVE_BYTES = "reserve", 1 << 21
"""Room kept for the skeleton: should the disk fill up, our own writes must be the ones that find out, and say it in a line."""

Dtype = Literal["keep", "bfloat16", "float32"]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """What is written, checksummed and journalled together: tensors that share files, and those files."""

    name: str
    rows: tuple[Row, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def hf2jax(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Dtype = "keep",
    overwrite: bool = False,
    resume: bool = False,
    worker: int = 0,
    workers: int = 1,
    dry_run: bool = False,
    report: Report = lambda line: None,
) -> None:
    """Converts `source` into the new directory `destination`, which appears by one rename.

    Args:
      source: a Hugging Face checkpoint directory.
      dtype: of the stored parameters.
      overwrite: replace an existing converted directory once the new one is whole.
      resume: go on with what a killed run left in `DST.converting`.
      worker, workers: this process's share, 0-based; the last of them to finish makes `destination` appear.
      dry_run: check everything, say what would be written, write nothing.
      report: takes each line of progress.
    Raises:
      CheckpointError, ConfigError: before anything is written, if either directory is not as expected.
      OSError: the disk is full, for one; `DST.converting` is left for `resume`.
    """
    start = time.monotonic()
    source, destination = Path(source), Path(destination)
    if resume and only_cleaning_is_left(destination.resolve()):
        shutil.rmtree(work_path(destination.resolve()))
        report(f"{destination}: was whole already")
        return
    check_destination(source, destination, overwrite)
    try:
        str(destination.resolve()).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{destination}: the name is not UTF-8, which Orbax needs; expected another DST") from None
    if overwrite:
        check_replaced(destination.resolve())
    weights = open_source(source)
    if weights.quantised and dtype == "keep":
        raise CheckpointError(f"{source}: float8 weights are dequantised, expected --dtype bfloat16 or float32 instead of keep")
    side_files = find_side_files(source)
    dtypes = weights.dtypes if dtype == "keep" else dict.fromkeys(weights.shapes, np.dtype(dtype))
    leaves = plan_leaves(weights.shapes, dtypes)
    units = plan_units(weights, leaves)
    size = sum(info.nbytes for info in weights.files.tensors.values())
    layout = f", {weights.match.expert_layout} expert layout" if weights.match.expert_layout else ""
    report(
        f"{source}: {len(weights.files.tensors)} tensors in {len(weights.files.files)} files, {size:,} bytes{layout}\n"
        f"{destination}: {len(leaves)} arrays in {sum(len(unit.pieces) for unit in units):,} files, "
        f"{sum(leaf.nbytes for leaf in leaves):,} bytes to write"
    )
    if dry_run:
        report("dry run: everything was checked, nothing was written")
        return
    _warn_of_space(destination, sum(leaf.nbytes for leaf in leaves), report, resume)

    def begin(staging: Path) -> None:
        copy_side_files(source, staging, side_files, None if not weights.quantised else dtype)
        with naming(staging.parent / RESERVE):
            (staging.parent / RESERVE).write_bytes(bytes(RESERVE_BYTES))

    mine = share(units, worker, workers)
    plan = describe_plan(weights, source, dtype, workers)
    opened = open_work_directory(destination.resolve(), plan, begin, resume=resume, worker=worker, workers=workers)
    with telling_of_resume(work_path(destination.resolve())), opened as work:
        with ThreadPoolExecutor(1) as aside:
            if worker == 0:
                aside.submit(load_orbax)  # takes seconds
            peak = write_units(weights, mine, work, report)
        if worker == 0:
            (work.path / RESERVE).unlink(missing_ok=True)
            write_skeleton(work.result / CHECKPOINT_DIR, leaves, work.path / SKELETON)

        def complete(checksums: dict[str, str]) -> None:
            record = conversion_record(weights, source, dtype, checksums)
            write_text(work.result / CONVERSION_FILE, json.dumps(record, indent=1) + "\n")

        whole = work.finish(destination.resolve(), complete, overwrite=overwrite)
    if not whole:
        report(f"worker {worker} of {workers} is done; {destination} appears when the last one is")
        return
    parameters, seconds = sum(map(math.prod, weights.shapes.values())), time.monotonic() - start
    digest = hashlib.sha256((destination / CONVERSION_FILE).read_bytes()).hexdigest()
    report(
        f"checksum {digest[:16]}: sha256 of {CONVERSION_FILE}, which has every tensor's\n"
        f"{destination}: {len(weights.files.tensors)} tensors, {parameters:,} parameters, {size:,} bytes read, "
        f"{seconds:.1f} seconds, {human_bytes(size / seconds)}/s, peak anonymous memory {human_bytes(peak)}"
    )


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


def copy_side_files(source: Path, target: Path, names: list[str], dequantised: Dtype | None) -> None:
    """Copies them byte for byte; only a dequantised model's config.json stops saying that it is quantised."""
    for name in names:
        copy_file(source / name, target / name)
    if dequantised:
        path = target / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        del config["quantization_config"]
        for section in (config, config["text_config"], config["vision_config"]):
            section.update({key: dequantised for key in ("dtype", "torch_dtype") if key in section})
        write_text(path, json.dumps(config, indent=2) + "\n")


def _warn_of_space(destination: Path, needed: int, report: Report, resume: bool) -> None:
    parent = next(path for path in destination.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free and not resume:
        report(
            f"warning: {human_bytes(needed)} to write, {human_bytes(free)} free on {parent}; if it fills, --resume goes on later"
        )


def plan_units(weights: HFWeights, leaves: list[Leaf]) -> list[Unit]:
    """The units in the order of the table."""
    units = []
    for leaf in leaves:
        lead = len(leaf.shape) - len(weights.rows[leaf.path][0].shape)
        stacked = 0 if leaf.chunks.file[:1] == leaf.shape[:1] else min(lead, 1)
        groups: dict[tuple[int, ...], tuple[list[Row], list[Piece]]] = {}
        for piece in leaf_pieces(leaf):
            groups.setdefault(piece.cell[:stacked], ([], []))[1].append(piece)
        for row in weights.rows[leaf.path]:
            groups[row.index[:stacked]][0].append(row)  # type: ignore[index]  # leading axes are numbers
        for cell, (rows, pieces) in groups.items():
            units.append(Unit(".".join([leaf.name, *map(str, cell)]), tuple(rows), tuple(pieces)))
    return units


def share(units: list[Unit], worker: int, workers: int) -> list[Unit]:
    """This worker's units: of all, largest first, each goes to whoever has least so far."""
    loads = [0] * workers
    mine = []
    for position, unit in sorted(enumerate(units), key=lambda item: (-item[1].nbytes, item[0])):
        chosen = loads.index(min(loads))
        loads[chosen] += unit.nbytes
        if chosen == worker:
            mine.append((position, unit))
    return [unit for _, unit in sorted(mine, key=lambda item: item[0])]


def write_units(weights: HFWeights, units: list[Unit], work: WorkDirectory, report: Report) -> int:
    """Writes what is not there yet. Returns the peak of this process's anonymous memory in bytes."""
    writer = LeafWriter(work.result / CHECKPOINT_DIR)
    todo = [unit for unit in units if unit.name not in work.finished or not all(map(writer.done, unit.pieces))]
    total, left = sum(unit.nbytes for unit in units), sum(unit.nbytes for unit in todo)
    # first those that are only copied: the disk is at work at once, and still has some to write while others are turned
    todo.sort(key=lambda unit: any(row.axes != tuple(range(len(row.axes))) for row in unit.rows))
    if left < total:
        report(f"{human_bytes(total - left)} of {human_bytes(total)} are there already")
    unit_of = {piece.file: unit for unit in todo for piece in unit.pieces}
    waiting = {unit.name: len(unit.pieces) for unit in todo}
    with Progress(total, report, already=total - left) as progress, ThreadPoolExecutor(1) as pool:
        sums: dict[str, Future[dict[str, str]]] = {}

        def data() -> Iterator[tuple[Piece, np.ndarray]]:
            for unit in todo:
                sums[unit.name] = pool.submit(checksums, weights, unit.rows)
                for piece in unit.pieces:
                    yield piece, weights.read(piece.leaf.path, piece.index, piece.leaf.dtype, copy=False)

        try:
            for piece in writer.write(data()):
                progress.add(piece.nbytes)
                unit = unit_of[piece.file]
                waiting[unit.name] -= 1
                if not waiting[unit.name]:
                    work.record(unit.name, sums.pop(unit.name).result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return progress.peak


def checksums(weights: HFWeights, rows: tuple[Row, ...]) -> dict[str, str]:
    """CRC-32 of the bytes on disk of these tensors and their scales."""
    return {row.key: f"{crc32(weights.tensor(row.key)):08x}" for row in rows} | {
        weights.match.scales[row.key]: f"{crc32(weights.files.array(weights.match.scales[row.key])):08x}"
        for row in rows
        if row.key in weights.match.scales
    }


def describe_plan(weights: HFWeights, source: Path, dtype: Dtype, workers: int) -> dict[str, Any]:
    """What a run must agree on with the one that it goes on for. Files count as the same by size and time of change."""
    headers = [[key, DTYPE_NAMES[t.dtype], t.shape, t.file.name, t.start] for key, t in sorted(weights.files.tensors.items())]
    files = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in (*weights.files.files, source / "config.json")}
    return {
        "table_version": TABLE_VERSION,
        "source": source.resolve().name,
        "source files": hashlib.sha256(json.dumps([headers, files]).encode()).hexdigest(),
        "dtype": dtype,
        "workers": workers,
    }


def conversion_record(weights: HFWeights, source: Path, dtype: Dtype, sums: dict[str, str]) -> dict[str, Any]:
    """`conversion.json`: what is needed to verify the conversion and to write the same files back.

    `tensors` and `scales` (float8 only) go by the names of the table and of the disk, each with dtype, shape and CRC-32.
    """

    def entry(name: str, crc: str) -> dict[str, Any]:
        info = weights.files.tensors[name]
        return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "crc32": crc}

    names, match = weights.match.names, weights.match
    duplicate = entry(names[LM_HEAD_KEY], f"{crc32(weights.tensor(LM_HEAD_KEY)):08x}") if match.tied_lm_head else None
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "table_version": TABLE_VERSION,
        "source": describe_source(source.resolve()),
        "expert_layout": match.expert_layout,
        "dtype": dtype,
        "tied_lm_head": duplicate,
        "tensors": {row.key: entry(names[row.key], sums[row.key]) for row in match.rows},
        "scales": {name: entry(name, sums[name]) for name in match.scales.values()},
    }
