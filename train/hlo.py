"""Collectives read off a compiled program's text: what moves, over which mesh axes, how often.

A loop's body is printed once; it counts as often as the loop runs, which is the constant its condition compares with
(`cost_analysis` counts it once). A conditional counts its dearest branch. Padding that the compiler adds is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
# `%name (params) -> type {` opens a computation. Kernel bodies are quoted strings that hold lines of any shape, so only a
# line that begins with a name, and is no instruction (` = `), opens one.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# How the TPU compiler prints a reduce-scatter whose shards it pads to whole tiles: a fusion of an all-reduce and each device's
# slice of it, run by what runs reduce-scatter instructions (its emitter is an `AllReduceScatterFusion` too) and, on TPU v2, in
# the time of one (https://jax-ml.github.io/scaling-book/profiling).
_SCATTER_FUSION = "all-reduce-scatter"
# How it prints, on v5e, a collective that runs beside other work: the instruction stands in every fusion it overlaps with, in
# the one that starts it (a call of this target) and in the one that waits for it, under one `chain_id`.
_CHAINED, _CHAIN_START = 'chain_id="', '"AsyncCollectiveStart"'
_USED = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: of KINDS. axes: the mesh axes its groups run over. size: devices in a group. times: how often a step runs it.
      wire_bytes: what one device sends in all those runs, by the best known algorithm on a ring (see `wire_bytes`).
      scope: the op_name jax gave it (named scopes and primitive).
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    times: int
    wire_bytes: float
    scope: str


@dataclass
class _Computation:
    lines: list[tuple[str, str]]  # (name, right-hand side)


def wire_bytes(kind: str, result_bytes: float, size: int) -> float:
    """Bytes one device sends: (n-1)/n of the whole for a gather or a scatter, twice that for an all-reduce.

    Args:
      result_bytes: of the instruction's result: the whole for all-gather and all-reduce, a part for reduce-scatter.
    """
    share = (size - 1) / size
    if kind == "all-reduce":
        return 2 * result_bytes * share
    if kind == "reduce-scatter":
        return result_bytes * (size - 1)
    if kind == "collective-permute":
        return result_bytes
    return result_bytes * share


def shape_bytes(text: str) -> list[float]:
    """Bytes of every array shape in `text`, in order."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * _BYTES[dtype] for dtype, dims in _SHAPE.findall(text) if dtype in _BYTES
    ]


def computations(hlo: str) -> tuple[dict[str, _Computation], str]:
    """The program's computations by name, and the entry's name."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if opened := _COMPUTATION.match(line):
            current = found.setdefault(opened[2], _Computation([]))
            entry = opened[2] if opened[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.lines.append((instruction[1], instruction[2]))
    return found, entry


def _opcode(rhs: str) -> tuple[str, str]:
    """`(opcode, result type)` of an instruction's right-hand side; tuple types hold parentheses, so they are skipped first."""
    at, depth = 0, 0
    while rhs.startswith("(") and (at == 0 or depth):
        depth += (rhs[at] == "(") - (rhs[at] == ")")
        at += 1
    match = _OPCODE.search(rhs, max(0, at - 1))
    return (match[1], rhs[: match.start(1)]) if match else ("", rhs)


def is_collective(rhs: str) -> bool:
    """Whether an instruction (its right-hand side) is one of KINDS, or the start of one."""
    return _opcode(rhs)[0].removesuffix("-start") in KINDS


def called(rhs: str) -> list[str]:
    """The computations that an instruction (its right-hand side) runs: bodies, conditions, branches, fusions."""
    return [*_CALLED.findall(rhs), *(name.strip().lstrip("%") for names in _BRANCHES.findall(rhs) for name in names.split(","))]


def groups(text: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Axes and size of the replica groups an instruction prints, in any of XLA's spellings.

    Args:
      mesh: axis -> size in the order of the devices; partition i is the mesh's device i in row-major order.
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2] or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        within = re.findall(r"'(\w+)'", named[3])
        one = ids[tuple(slice(None) if name in within else 0 for name in sizes)]
        return _spanned(one.reshape(-1).tolist(), mesh)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _spanned(_iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])[0].reshape(-1).tolist(), mesh)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return _spanned([int(n) for n in listed[1].split(",")], mesh)
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return _spanned([int(pairs[1]), int(pairs[2])], mesh)[0], 2
    return tuple(axis for axis, n in mesh.items() if n > 1), math.prod(mesh.values())


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 in that shape, transposed, in a row."""
    dims, _, order = text.strip("[)").partition("]T(")
    ids = np.arange(math.prod(shape := [int(n) for n in dims.strip("]").split(",")])).reshape(shape)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _spanned(ids: Sequence[int], mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the devices of one group differ."""
    places = np.array(np.unravel_index(np.array(ids), tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1), len(ids)


def trip_count(condition: str, program: Mapping[str, _Computation]) -> int:
    """How often a loop runs: the largest integer constant of its condition and of what the condition calls.

    (`compare(i, n)` against a counter that starts at 0 and steps by 1, as `lax.scan` and `lax.map` compile to.)
    """
    constants, pending = [1], [condition]
    while pending:
        for _, rhs in program[pending.pop()].lines:
            constants += [int(n) for n in re.findall(r"^[su]32\[\][^ ]* constant\((\d+)\)", rhs)]
            pending += [name for name in _CALLED.findall(rhs) if name in program]
    return max(constants)


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective one step of the program runs, loops multiplied out."""
    program, entry = computations(hlo)

    @functools.cache
    def inside(name: str) -> tuple[Collective, ...]:
        lines = program[name].lines
        made = dict(lines)
        started = {used for _, rhs in lines if _CHAIN_START in rhs for used in _USED.findall(rhs)}
        once = (rhs for own, rhs in lines if own in started or not (_CHAINED in rhs and is_collective(rhs)))
        return tuple(found for rhs in once for found in _of(rhs, made))

    def _of(rhs: str, made: Mapping[str, str]) -> Iterator[Collective]:
        opcode, result = _opcode(rhs)
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            axes, size = groups(rhs, mesh)
            sizes = shape_bytes(result)
            if opcode.endswith("-start") and len(sizes) > 1 and kind != "all-reduce":
                # (operands..., results..., contexts...): the results are the second of the equal halves
                sizes = [n for n in sizes if n > 4] or sizes
                sizes = sizes[len(sizes) // 2 :]
            if kind == "ragged-all-to-all":
                # Rows sent lie in a buffer for the worst routing at one end. At the other they fill it, whatever the routing.
                operand = made[_USED.findall(rhs[rhs.index(f"{opcode}(") :])[0]]
                sizes = [min(sum(sizes), sum(shape_bytes(_opcode(operand)[1])))]
            scope = name[1] if (name := _OP_NAME.search(rhs)) else ""
            if size > 1:
                yield Collective(kind, axes, size, 1, wire_bytes(kind, sum(sizes), size), scope)
            return
        if opcode == "while":
            body, condition = (re.search(rf"\b{key}=%?([\w.\-]+)", rhs) for key in ("body", "condition"))
            assert body and condition
            for found in inside(body[1]):
                yield _repeated(found, trip_count(condition[1], program))
            return
        parts = [name for name in called(rhs) if name in program]
        if opcode == "conditional":
            yield from max((inside(name) for name in parts), key=lambda found: sum(c.wire_bytes for c in found))
        elif opcode == "fusion" and any(name.startswith(_SCATTER_FUSION) for name in parts):
            for found in (found for name in parts for found in inside(name)):
                sent = wire_bytes("reduce-scatter", sum(shape_bytes(result)), found.size)
                yield dataclasses.replace(found, kind="reduce-scatter", wire_bytes=sent)
        else:
            for name in parts:
                yield from inside(name)

    return list(inside(entry))


def _repeated(one: Collective, times: int) -> Collective:
    return Collective(one.kind, one.axes, one.size, one.times * times, one.wire_bytes * times, one.scope)


def by_kind(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Wire bytes by kind and axes, the dearest first."""
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for one in found:
        sums[one.kind, one.axes] += one.wire_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
