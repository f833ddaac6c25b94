"""Writing an Orbax checkpoint that is larger than memory, file by file.

Orbax saves whole arrays. So it saves a skeleton, the same tree with leaves of one number, which makes it write all of its own
metadata; the leaves themselves, `zarr.json` and data, are ours. Arrays are plain zarr3 files
(Orbax: `use_ocdbt=False`): each file appears by one rename and its name says what it holds, so what is finished is what is there,
several processes write side by side, and there is no database to merge afterwards.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from convert.chunks import Chunks, pieces, plan_chunks
from convert.zarr_file import write_zarr_file, write_zarr_metadata
from qvlmoe_jax.checkpoint import ARRAYS_DIR
from qvlmoe_jax.param_tree import nest
from qvlmoe_jax.sharding_table import table_row

WRITES_IN_FLIGHT = 2


@dataclass(frozen=True)
class Leaf:
    """One parameter to be written.

    Attributes:
      path: '/'-joined keys.
      shape, dtype: of the whole parameter on disk.
      chunks: how it is cut.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Chunks

    @property
    def name(self) -> str:
        """Orbax's name of the array: its directory inside the tree's."""
        return self.path.replace("/", ".")

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """One file: a slice of a leaf."""

    leaf: Leaf
    cell: tuple[int, ...]
    index: tuple[slice, ...]

    @property
    def file(self) -> str:
        """Relative to the tree's directory (zarr3's default chunk keys)."""
        return "/".join([self.leaf.name, "c", *map(str, self.cell)])

    @property
    def nbytes(self) -> int:
        return int(np.prod([s.stop - s.start for s in self.index], dtype=np.int64)) * self.leaf.dtype.itemsize


def plan_leaves(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype]) -> list[Leaf]:
    """The parameters in the order in which they are written."""
    return [
        Leaf(path, shape, dtypes[path], plan_chunks(shape, table_row(path), dtypes[path].itemsize))
        for path, shape in shapes.items()
    ]


def leaf_pieces(leaf: Leaf) -> list[Piece]:
    """The files of one leaf."""
    return [Piece(leaf, cell, index) for cell, index in pieces(leaf.shape, leaf.chunks)]


def load_orbax() -> ModuleType:
    """Orbax's current API, which takes seconds to import."""
    from orbax.checkpoint import v1

    return v1


def write_skeleton(checkpoint: Path, leaves: Iterable[Leaf], scratch: Path) -> None:
    """Adds to `checkpoint` what Orbax writes around the arrays: names, kinds, that the checkpoint is whole.

    The arrays may be there already. Doing it twice does no harm.

    Args:
      scratch: a directory beside `checkpoint`, made and removed.
    """
    ocp = load_orbax()
    # numpy's, so that a load that names no sharding gives numpy arrays: a device of this machine would mean nothing elsewhere
    tree = {leaf.path: np.zeros((1,) * len(leaf.shape), leaf.dtype) for leaf in leaves}
    context = ocp.Context()
    saving = context.array.saving
    # what describes whole arrays on a mesh would be false of the leaves that replace these
    saving.use_ocdbt, saving.use_zarr3, saving.use_compression = False, True, False
    saving.enable_write_sharding_file, saving.array_metadata_store = False, None
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that there is no database to merge
    try:
        with context:
            shutil.rmtree(scratch, ignore_errors=True)
            ocp.save(str(scratch.resolve()), nest(tree))
    finally:
        log.setLevel(level)
    for name in tree:
        shutil.rmtree(scratch / ARRAYS_DIR / name.replace("/", "."))
    for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
        target = checkpoint / file.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(scratch)


class LeafWriter:
    """Writes pieces into a skeleton, a few at a time. Any number of processes may write different pieces."""

    def __init__(self, checkpoint: Path):
        self.directory = checkpoint / ARRAYS_DIR
        self._created: set[str] = set()

    def done(self, piece: Piece) -> bool:
        """The piece's file is there, and so is whole."""
        return (self.directory / piece.file).is_file()

    def write(self, data: Iterable[tuple[Piece, np.ndarray]]) -> Iterator[Piece]:
        """Writes each array as its piece; yields the pieces once their files are there."""
        pending: deque[Future[Piece]] = deque()
        with ThreadPoolExecutor(WRITES_IN_FLIGHT) as pool:
            for piece, array in data:
                if piece.leaf.path not in self._created:
                    leaf = piece.leaf
                    write_zarr_metadata(self.directory / leaf.name, leaf.shape, leaf.dtype, leaf.chunks.file, leaf.chunks.chunk)
                    self._created.add(leaf.path)
                pending.append(pool.submit(self._write, piece, array))
                del array
                if len(pending) >= WRITES_IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _write(self, piece: Piece, array: np.ndarray) -> Piece:
        write_zarr_file(self.directory / piece.file, array, piece.leaf.chunks.file, piece.leaf.chunks.chunk)
        return piece
