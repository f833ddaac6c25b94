"""Any slice of any array of an Orbax checkpoint on disk, read when asked for.

Orbax restores whole trees; streaming, export and comparison need parts of leaves, and a mesh needs each process to read only the
chunks of its shards. So the arrays are opened with TensorStore, the library that Orbax itself stores them with, or, where they
are our converter's plain files, mapped (`zarr_files`). Only `_METADATA` (names of the leaves, storage driver) is Orbax's own.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.local_files import read_json
from qvlmoe_jax.zarr_files import ZarrFiles

if TYPE_CHECKING:
    import tensorstore as ts

METADATA_FILE = "_METADATA"
OCDBT_MANIFEST = "manifest.ocdbt"


def unreadable(path: Path, error: Exception | str) -> CheckpointError:
    """One line for whatever a storage library says of a damaged checkpoint."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(f"{path}: expected a whole Orbax checkpoint, but {lines[0][:300]}; convert the source again")


def store_spec(directory: Path, name: str, *, ocdbt: bool = False, zarr3: bool = True) -> dict[str, Any]:
    """TensorStore's description of the array that Orbax keeps under `name` (keys joined by dots) in `directory`."""
    base = directory.resolve().as_uri() + "/"
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else base + f"{name}/"
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}


def _check_chunks(store: ts.TensorStore) -> None:
    """Raises ValueError for chunks larger than the array: reading one number would need any amount of memory."""
    layout = store.chunk_layout
    for chunk in (layout.read_chunk.shape or (), layout.write_chunk.shape or ()):
        if any(step is not None and step > max(size, 1) for step, size in zip(chunk, store.shape, strict=False)):
            raise ValueError(f"its chunks {list(chunk)} are larger than the array {list(store.shape)}")


class OrbaxArrays:
    """The arrays of one pytree item (`CHECKPOINT/state`).

    Attributes:
      directory: that item's directory.
      names: parameter path ('/'-joined keys below `prefix`) -> the array's name in the store.
    """

    def __init__(self, directory: str | Path, prefix: tuple[str, ...] = ()):
        """Raises CheckpointError if the metadata is missing or damaged. `prefix` chooses a subtree, as ('params',)."""
        self.directory = Path(directory)
        file = self.directory / METADATA_FILE
        if not file.is_file():
            raise unreadable(self.directory, f"{METADATA_FILE} is not there")
        try:
            metadata = read_json(file)
        except CheckpointError as error:
            raise unreadable(self.directory, error) from None
        tree = metadata.get("tree_metadata") if isinstance(metadata, dict) else None
        if not isinstance(tree, Mapping):
            raise unreadable(file, "it has no tree_metadata")
        try:
            keys = [tuple(str(key) for key in ast.literal_eval(name)) for name in tree]
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:  # the last two: nested too deep
            raise unreadable(file, error) from None
        for key in keys:
            if any(not part or part in (".", "..") or set(part) & set("/\\\0") for part in key):
                raise unreadable(file, f"{key!r:.200} is no name of an array")
        self.names = {"/".join(key[len(prefix) :]): ".".join(key) for key in keys if key[: len(prefix)] == prefix}
        self._zarr3 = bool(metadata.get("use_zarr3"))
        self._ocdbt = (self.directory / OCDBT_MANIFEST).is_file()

    @cached_property
    def _files(self) -> dict[str, ZarrFiles]:
        """Those that can be read straight from mapped files."""
        if self._ocdbt or not self._zarr3:
            return {}
        found = {path: ZarrFiles.open(self.directory / name) for path, name in self.names.items()}
        return {path: files for path, files in found.items() if files is not None}

    @cached_property
    def _stores(self) -> dict[str, ts.TensorStore]:
        """The others. All are opened at once: each needs a small read."""
        others = {path: name for path, name in self.names.items() if path not in self._files}
        if not others:
            return {}
        import tensorstore as ts

        context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 24}})  # for the shards' indexes
        opening = {
            path: ts.open(
                # a lost file must not read as zeros; Orbax, and our writer, store zeros as well
                store_spec(self.directory, name, ocdbt=self._ocdbt, zarr3=self._zarr3) | {"fill_missing_data_reads": False},
                open=True,
                read=True,
                context=context,
            )
            for path, name in others.items()
        }
        stores, failed = {}, []
        for path, future in opening.items():
            try:
                stores[path] = future.result()
                _check_chunks(stores[path])
            except (ValueError, OSError, RuntimeError) as error:
                failed.append((path, error))
        if failed:
            path, error = failed[0]
            raise unreadable(self.directory / self.names[path], error)
        return stores

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape."""
        return {path: tuple(array.shape) for path, array in {**self._files, **self._stores}.items()}

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Path -> dtype on disk."""
        mapped = {path: files.dtype for path, files in self._files.items()}
        return mapped | {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

    def read(self, path: str, index: tuple[slice | int, ...] | None = None, *, copy: bool = True) -> np.ndarray:
        """One array, or the part of it that `index` (slices of step 1, integers) names, in its own dtype.

        With `copy=False` it may be a read-only view of a mapped file.

        Raises:
          CheckpointError: the data is missing or damaged.
        """
        try:
            if path in self._files:
                return self._files[path].read(index, copy=copy)
            store = self._stores[path]
            return (store if index is None else store[index]).read().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise unreadable(self.directory / self.names[path], error) from error
