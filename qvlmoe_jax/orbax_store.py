"""Any slice of any array of an Orbax checkpoint on disk, read when asked for.

Orbax restores whole trees; streaming, export and comparison need parts of leaves, and a mesh needs each process to read only the
chunks of its shards. So the arrays are opened with TensorStore, the library that Orbax itself stores them with. Only `_METADATA`
(names of the leaves, storage driver) is Orbax's own.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.safetensors_io import parse_json

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
            metadata = parse_json(file.read_bytes(), METADATA_FILE)
        except CheckpointError as error:
            raise unreadable(self.directory, error) from None
        tree = metadata.get("tree_metadata") if isinstance(metadata, dict) else None
        if not isinstance(tree, Mapping):
            raise unreadable(file, "it has no tree_metadata")
        try:
            keys = [tuple(str(key) for key in ast.literal_eval(name)) for name in tree]
        except (ValueError, SyntaxError, TypeError) as error:
            raise unreadable(file, error) from None
        self.names = {"/".join(key[len(prefix) :]): ".".join(key) for key in keys if key[: len(prefix)] == prefix}
        self._zarr3 = bool(metadata.get("use_zarr3"))
        self._ocdbt = (self.directory / OCDBT_MANIFEST).is_file()

    @cached_property
    def _stores(self) -> dict[str, ts.TensorStore]:
        """All opened at once: each needs a small read."""
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
            for path, name in self.names.items()
        }
        stores, failed = {}, []
        for path, future in opening.items():
            try:
                stores[path] = future.result()
            except (ValueError, OSError, RuntimeError) as error:
                failed.append((path, error))
        if failed:
            path, error = failed[0]
            raise unreadable(self.directory / self.names[path], error)
        return stores

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape."""
        return {path: tuple(store.shape) for path, store in self._stores.items()}

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Path -> dtype on disk."""
        return {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

    def read(self, path: str, index: tuple[slice | int, ...] | None = None) -> np.ndarray:
        """One array, or the part of it that `index` (slices of step 1, integers) names, in its own dtype.

        Raises:
          CheckpointError: the data is missing or damaged.
        """
        store = self._stores[path]
        try:
            return (store if index is None else store[index]).read().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise unreadable(self.directory / self.names[path], error) from error
