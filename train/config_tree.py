"""Frozen dataclasses from YAML and `--dotted.key value`, by their annotations alone; and back to plain objects.

Known types: bool, int, float, str, `Literal`, `X | None`, `tuple[X, ...]`, `dict[str, X]`, `Any`, and dataclasses of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from qvlmoe_jax.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `cls` from nested plain objects.

    Args:
      where: dotted path of `tree` in the whole config, for messages.
    Raises:
      ConfigError: an unknown key (with the nearest known one), a missing one, or a value of another type, by dotted path.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'the config'} is {tree!r}, expected a mapping of {cls.__name__}'s keys")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"unknown key {_join(where, str(key))!r}{_nearest(str(key), fields)}")
        values[key] = convert(hints[key], value, _join(where, key))
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(where, name)} is missing, expected a value (it has no default)")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` asks. `1e-4`, a string to YAML 1.1, is a float where a float is wanted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}, expected one of {', '.join(map(str, args))}")
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        return tuple(convert(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict or origin is Mapping or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}, expected a mapping")
        inner = args[1] if args else Any
        return {str(key): convert(inner, item, _join(where, str(key))) for key, item in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(options: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and hint is float:
            return number
        if number is not None and number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
    raise ConfigError(f"{where} is {value!r}, expected {names.get(hint, getattr(hint, '__name__', str(hint)))}")


def plain(value: Any) -> Any:
    """Nested dataclasses as dicts, lists, numbers and strings: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def override(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `tree["a"]["b"] = value` for `a.b`, making mappings on the way; a number indexes a list.

    Raises:
      ConfigError: the path runs through a value that holds no keys, or past the end of a list.
    """
    *parents, last = dotted.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, dotted)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--{dotted}: {'.'.join(parents[: i + 1])} is {node!r} and holds no keys")
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--{dotted}: {part!r} is no position of a list of {len(items)}, expected 0 .. {len(items) - 1}")
    return int(part)


def changes(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted paths at which two plain trees differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [line for key in sorted({*old, *new}) for line in changes(old.get(key), new.get(key), _join(where, key))]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(sorted(known))}"
