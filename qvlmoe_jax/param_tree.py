"""The parameter tree as nested dicts, and as a flat dict of '/'-joined paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from qvlmoe_jax.errors import CheckpointError

T = TypeVar("T")


def nest(flat: Mapping[str, T]) -> dict[str, Any]:
    """`{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`; keys that are numbers become their digits."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(node, Mapping):
            flat.update(flatten(node, path))
        else:
            flat[path] = node
    return flat


def check_shapes(
    where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, of: str = "config.json"
) -> None:
    """Refuses a parameter tree that is not the config's, or that of whatever else `of` names.

    Raises:
      CheckpointError: names the first parameters that are missing, unknown or of another shape.
    """
    for fault, paths in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if paths:
            raise CheckpointError(
                f"{where}: {len(paths)} {fault} parameters, first {min(paths)!r}; expected the tree {of} describes"
            )
    for path, shape in expected.items():
        if found[path] != shape:
            raise CheckpointError(f"{where}: parameter {path!r} has shape {list(found[path])}, expected {list(shape)}")
