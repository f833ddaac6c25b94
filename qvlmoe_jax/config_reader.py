"""Reading one section of a `config.json`: typed access that names the key in every complaint, and the rotary spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qvlmoe_jax.errors import ConfigError

MAX_NUMBER = 1e300
MAX_LAYERS = 512
"""The deepest released model has 94; how long planning takes grows faster than the number of layers."""


class SectionReader:
    """Takes keys out of one section of a config.json, remembering which were used and naming what is wrong."""

    def __init__(self, section: Any, where: str):
        if not isinstance(section, Mapping):
            raise ConfigError(f"config.json: {where or 'the top level'} is {type(section).__name__}, expected an object")
        self.section, self.where, self.used = section, where, set()

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def has(self, key: str) -> bool:
        return self.section.get(key) is not None

    def raw(self, key: str) -> Any:
        self.used.add(key)
        return self.section.get(key)

    def checked(self, key: str, value: Any, kind: type, minimum: float | None, maximum: float = MAX_NUMBER) -> Any:
        integral = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        # an int beyond every float is in JSON's power
        numeric = not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER
        if not numeric or (kind is int and not integral) or (minimum is not None and value < minimum) or value > maximum:
            bound = "" if minimum is None else f" >= {minimum:g}"
            bound += "" if maximum == MAX_NUMBER else f" and <= {maximum:g}"
            raise ConfigError(f"config.json: {self.name(key)} is {value!r:.80}, expected {kind.__name__}{bound}")
        return kind(value)

    def number(self, key: str, kind: type, default: Any = None, minimum: float | None = 1, maximum: float = MAX_NUMBER) -> Any:
        value = self.raw(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json: {self.name(key)} is missing, expected {kind.__name__}")
            return default
        return self.checked(key, value, kind, minimum, maximum)

    def integers(self, key: str, default: tuple[int, ...] = (), value: Any = None) -> tuple[int, ...]:
        value = self.raw(key) if value is None else value
        if value is None:
            return default
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"config.json: {self.name(key)} is {value!r}, expected a list of int")
        return tuple(self.checked(key, v, int, 0) for v in value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {self.name(key)} is {value!r}, expected true or false")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuses any value of `key` but the supported ones (the first is what a missing key means)."""
        value = self.raw(key)
        if value is not None and (value not in supported or isinstance(value, bool) != isinstance(supported[0], bool)):
            expected = " or ".join(json.dumps(s) for s in supported)
            raise ConfigError(
                f"config.json: {self.name(key)} = {json.dumps(value, default=str)} is not supported, expected {expected}"
            )

    def agree(self, key: str, other: str) -> None:
        """Two spellings of one fact may both be present, if they say the same."""
        if self.has(key) and self.has(other) and self.section[key] != self.section[other]:
            raise ConfigError(
                f"config.json: {self.name(key)} = {self.section[key]!r} contradicts {self.name(other)} = "
                f"{self.section[other]!r}; keep one of the two"
            )

    def extra(self) -> Mapping[str, Any]:
        return {k: v for k, v in self.section.items() if k not in self.used}


def rope_section(read: SectionReader) -> dict[str, Any]:
    """The rotary dictionary under either spelling: `rope_scaling` (hub, 4.57) or `rope_parameters` (5.x)."""
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = read.raw(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.json: {read.name(key)} is {value!r}, expected an object")
        value = dict(value)
        if "type" in value:
            value.setdefault("rope_type", value.pop("type"))
        if value.get("rope_type") == "mrope":  # an early spelling of the same thing
            value["rope_type"] = "default"
        for k, v in value.items():
            if merged.setdefault(k, v) != v:
                raise ConfigError(
                    f"config.json: {read.name('rope_scaling')}.{k} = {merged[k]!r} contradicts "
                    f"{read.name('rope_parameters')}.{k} = {v!r}; keep one of the two"
                )
    return merged


def read_rope_theta(read: SectionReader, rope: Mapping[str, Any], default: float) -> float:
    """The rotary base under either spelling, flat or in the rotary dictionary; both may be present if they agree."""
    flat, nested = read.raw("rope_theta"), rope.get("rope_theta")
    if flat is not None and nested is not None and flat != nested:
        raise ConfigError(
            f"config.json: {read.name('rope_theta')} = {flat!r} contradicts {read.name('rope_parameters')}.rope_theta = "
            f"{nested!r}; keep one of the two"
        )
    value = flat if flat is not None else nested
    return default if value is None else read.checked("rope_theta", value, float, 1.0)
