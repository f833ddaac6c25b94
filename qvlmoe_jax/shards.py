"""A Hugging Face directory's weight files: one `model.safetensors`, or shards named by `model.safetensors.index.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import numpy as np

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import MappedFile, write_text
from qvlmoe_jax.local_files import local_file, read_json
from qvlmoe_jax.safetensors_io import TensorInfo, TensorSpec, map_tensor, read_header, write_order, write_safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


def listed(names: Sequence[str]) -> str:
    """The first three of many names and how many more there are: a message is one line."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_index(directory: Path) -> dict[str, str]:
    path = local_file(directory, INDEX_FILE)
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: no usable weight_map, expected an object of tensor name -> file name")
    return weight_map


def _read_sharded(directory: Path) -> dict[str, TensorInfo]:
    weight_map = _read_index(directory)
    index = directory / INDEX_FILE
    tensors: dict[str, TensorInfo] = {}
    # every shard's presence is checked before any header is read
    paths = {name: local_file(directory, name) for name in sorted(set(weight_map.values()))}
    for path in paths.values():
        for key, info in read_header(path).items():
            if key in tensors:
                raise CheckpointError(f"{path}: tensor {key!r} is also in {tensors[key].file.name}, expected it in one shard")
            tensors[key] = info
    for key, info in tensors.items():
        if key not in weight_map:
            raise CheckpointError(f"{info.file}: tensor {key!r} is not in {INDEX_FILE}, expected every tensor to be listed there")
        if paths[weight_map[key]] != info.file:
            raise CheckpointError(f"{index}: tensor {key!r} is said to be in {weight_map[key]}, but it is in {info.file.name}")
    for key, name in weight_map.items():
        if key not in tensors:
            raise CheckpointError(f"{index}: tensor {key!r} is not in {name}, expected it there; download {name} again")
    return tensors


def _no_weights(directory: Path) -> CheckpointError:
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return CheckpointError(f"{directory}: empty directory, {expected}")
    if ADAPTER_CONFIG in names:
        return CheckpointError(
            f"{directory}: an adapter alone, {expected}; merge it into its base, or open that and use adapters.with_adapters"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if pickles:
        return CheckpointError(
            f"{directory}: only pickled weights ({listed(pickles)}), which run code when opened and are never read; {expected}"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    return CheckpointError(f"{directory}: {f'found {listed(others)}' if others else 'no weights'}, {expected}")


class SafetensorsCheckpoint:
    """The tensors of a directory, all headers checked when it is opened, data read when an array is used.

    Attributes:
      directory: where the files lie.
      tensors: name -> place, dtype and shape.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError, naming the file or key, if the directory is incomplete, damaged or contradicts its index."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: not a directory, expected one with {SINGLE_FILE} or {INDEX_FILE}")
        single, index = (self.directory / name for name in (SINGLE_FILE, INDEX_FILE))
        has_single, has_index = single.exists() or single.is_symlink(), index.exists() or index.is_symlink()
        if has_single and has_index and set(_read_index(self.directory).values()) != {SINGLE_FILE}:
            raise CheckpointError(
                f"{self.directory}: both {SINGLE_FILE} and {INDEX_FILE} with other shards, expected one; remove the stale one"
            )
        if has_index:
            self.tensors = _read_sharded(self.directory)
        elif has_single:
            self.tensors = read_header(local_file(self.directory, SINGLE_FILE))
        else:
            raise _no_weights(self.directory)
        self._mapped: dict[Path, MappedFile] = {}

    def array(self, key: str) -> np.ndarray:
        """A read-only view of one tensor in its memory-mapped file."""
        info = self.tensors[key]
        if info.file not in self._mapped:
            self._mapped[info.file] = MappedFile.open(info.file)
        return map_tensor(self._mapped[info.file], info)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return tuple(sorted({info.file for info in self.tensors.values()}))


def split_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors in the order in which they are written: one file if they fit, else shards as the hub's."""
    groups: list[list[str]] = [[]]
    filled = 0
    for key, (dtype, shape) in specs.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return {name: write_order({key: specs[key] for key in keys}) for name, keys in zip(names, groups, strict=True)}


def write_shards(
    directory: str | Path,
    specs: Mapping[str, TensorSpec],
    blocks: Callable[[str], Iterable[np.ndarray]],
    *,
    max_shard_bytes: int,
    files_at_once: int = 1,
) -> None:
    """Writes tensors as `split_shards` spreads them, and an index of several files.

    Args:
      directory: exists.
      specs: name -> (dtype, shape).
      blocks: as `write_safetensors` takes them.
      max_shard_bytes: of a file's data; a larger tensor gets a file of its own.
      files_at_once: above 1, each file is written in a thread of its own, in which its `blocks` are asked for.
    """
    directory = Path(directory)
    files = split_shards(specs, max_shard_bytes)
    of_file = {directory / name: {key: specs[key] for key in keys} for name, keys in files.items()}
    if files_at_once == 1:
        for path, own in of_file.items():
            write_safetensors(path, own, blocks)
    else:
        _write_side_by_side(of_file, blocks, files_at_once)
    if len(files) == 1:
        return
    weight_map = {key: name for name, keys in files.items() for key in keys}
    total = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for dtype, shape in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _write_side_by_side(
    of_file: Mapping[Path, Mapping[str, TensorSpec]], blocks: Callable[[str], Iterable[np.ndarray]], at_once: int
) -> None:
    """`write_safetensors` for each file in a thread of its own. The first failure stops the others and is raised."""
    stop = Event()

    def until_stopped(key: str) -> Iterator[np.ndarray]:
        for block in blocks(key):
            if stop.is_set():
                raise InterruptedError("another file could not be written")
            yield block

    with ThreadPoolExecutor(at_once) as pool:
        writing = [pool.submit(write_safetensors, path, own, until_stopped) for path, own in of_file.items()]
        try:
            for file in as_completed(writing):
                file.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
