"""A converted directory, or a training run, -> Hugging Face directory in the hub's layout, in bounded memory.

What came from the hub goes back bit for bit: tensors in the dtype that `conversion.json` (or, for a training run, whose master
weights are float32, config.json) gives, expert orientation and names of the hub, side files as they were.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert.directories import check_destination, find_side_files
from convert.progress import Progress, human_bytes
from convert.tensor_blocks import block_reads
from qvlmoe_jax.checkpoint import ConvertedWeights, TrainedWeights, open_weights, stated_dtypes
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import copy_file, write_text
from qvlmoe_jax.hf import EMBED_TOKENS_KEY, LM_HEAD_KEY, expand
from qvlmoe_jax.safetensors_io import DTYPE_NAMES, DTYPES, NAMED_DTYPES
from qvlmoe_jax.shards import write_shards
from qvlmoe_jax.whole_directory import whole_directory

READS_AHEAD = FILES_AT_ONCE = 2


def jax2hf(
    source: str | Path,
    destination: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes the new directory `destination`, which appears by one rename.

    Args:
      source: a converted directory, a training RUN (its newest step) or `RUN/checkpoints/STEP`.
      max_shard_size: bytes of one safetensors file's data.
      report: takes each line of progress.
    Raises:
      CheckpointError, ConfigError: before anything is written, if either directory is not as expected.
    """
    start = time.monotonic()
    source, destination = Path(source), Path(destination)
    check_destination(source, destination)
    weights = open_weights(source)
    if not isinstance(weights, ConvertedWeights | TrainedWeights):
        raise CheckpointError(f"{source}: a Hugging Face checkpoint already, expected a converted directory or a training run")
    side = weights.side_directory
    side_files = find_side_files(side)
    rows = {row.key: row for row in expand(weights.config)}
    dtypes = tensor_dtypes(weights, side)
    specs = {key: (dtypes[key], row.hf_shape) for key, row in rows.items()}
    if isinstance(weights, ConvertedWeights) and weights.conversion.get("tied_lm_head"):
        rows[LM_HEAD_KEY] = rows[EMBED_TOKENS_KEY]
        specs[LM_HEAD_KEY] = specs[EMBED_TOKENS_KEY]
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    report(f"{source}: {len(specs)} tensors, {total:,} bytes to write to {destination}")

    with (
        whole_directory(destination, suffix=".exporting") as staging,
        ThreadPoolExecutor(READS_AHEAD) as readers,
        Progress(total, report) as progress,
    ):

        def blocks(key: str) -> Iterator[np.ndarray]:
            for block in _ahead(readers, block_reads(weights, rows[key], specs[key][0])):
                yield block
                progress.add(block.nbytes)

        for name in side_files:
            copy_file(side / name, staging / name)
        _set_dtype(staging / "config.json", {dtype for dtype, _ in specs.values()})
        write_shards(staging, specs, blocks, max_shard_bytes=max_shard_size, files_at_once=FILES_AT_ONCE)
    seconds = time.monotonic() - start
    report(
        f"{destination}: {len(specs)} tensors, {sum(map(math.prod, weights.shapes.values())):,} parameters, {total:,} bytes "
        f"written, {seconds:.1f} seconds, {human_bytes(total / seconds)}/s, peak anonymous memory {human_bytes(progress.peak)}"
    )


def _ahead(pool: ThreadPoolExecutor, reads: Iterable[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """What the reads give, in their order, some of them under way while the one before is being written."""
    pending: deque[Future[np.ndarray]] = deque()
    for read in reads:
        pending.append(pool.submit(read))
        if len(pending) > READS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def tensor_dtypes(weights: ConvertedWeights | TrainedWeights, side: Path) -> dict[str, np.dtype]:
    """The dtype of each tensor to be written, by the table's name.

    A parameter that stacks tensors of several dtypes is stored as float32; `conversion.json` tells which each one had. A training
    run's master weights go back to the dtype that config.json names.
    """
    recorded: dict[str, Any] = {}
    common = None
    if isinstance(weights, ConvertedWeights) and weights.conversion.get("dtype") == "keep":
        recorded = weights.conversion.get("tensors", {})
    elif isinstance(weights, TrainedWeights):
        config = json.loads((side / "config.json").read_text(encoding="utf-8"))
        common = NAMED_DTYPES.get(next(iter(stated_dtypes(config)), ""))
    out = {}
    for row in expand(weights.config):
        entry = recorded.get(row.key)
        stored = weights.dtypes[row.path]
        dtype = DTYPES.get(entry["dtype"], stored) if isinstance(entry, dict) and "dtype" in entry else common or stored
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{weights.directory}: {row.path!r} is {dtype}, which safetensors cannot hold")
        out[row.key] = dtype
    return out


def _set_dtype(config_file: Path, dtypes: set[np.dtype]) -> None:
    """Corrects the dtype that config.json states, where the weights were cast; transformers loads in the one it finds there."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    names = {dtype.name for dtype in dtypes}
    stated = [(section, key) for section in _sections(config) for key in ("dtype", "torch_dtype") if key in section]
    if len(names) > 1 or not stated or all(str(section[key]) in names for section, key in stated):
        return
    for section, key in stated:
        section[key] = next(iter(names))
    write_text(config_file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    nested = (config.get(key) for key in ("text_config", "vision_config"))
    return [config, *(section for section in nested if isinstance(section, dict))]
