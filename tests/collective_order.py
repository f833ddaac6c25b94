"""Which collectives of a program XLA:CPU may start in another order on one device than on another (see `qvlmoe_jax/turns.py`)."""

from __future__ import annotations

import functools
import re

from train import hlo


def loose(text: str) -> list[tuple[str, str]]:
    """Pairs `(a, b)` of a compiled program's text: a loop or conditional with collectives, and a collective (or another such
    loop) after it that needs nothing of it."""
    program, _ = hlo.computations(text)

    @functools.cache
    def communicates(computation: str) -> bool:
        return any(hlo.is_collective(rhs) or nested(rhs) for _, rhs in program[computation].lines)

    def nested(rhs: str) -> bool:
        return any(communicates(name) for name in hlo.called(rhs) if name in program)

    found = []
    for computation in program.values():
        needs: dict[str, set[str]] = {}  # of each instruction all that it needs, directly or not
        before: list[str] = []  # loops and conditionals with collectives
        for name, rhs in computation.lines:
            operands = {operand for operand in re.findall(r"%([\w.\-]+)", rhs.split(", metadata=")[0]) if operand in needs}
            needs[name] = operands.union(*(needs[operand] for operand in operands))
            if hlo.is_collective(rhs) or nested(rhs):
                found += [(loop, name) for loop in before if loop not in needs[name]]
            if nested(rhs):
                before.append(name)
    return found
