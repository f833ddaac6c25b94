"""Two sides timed in one run, pair by pair, who goes first alternating, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.machine import clock

Call = Callable[[], Any]
SETTLING, LONG = 0.1, 1.0
"""Seconds that calls are repeated before one counts, and of a call that counts at once."""


def seconds(call: Call) -> float:
    """Of one call, which returns when its work is done."""
    start = clock()
    call()
    return clock() - start


def settled_seconds(call: Call) -> float:
    """Of one call after others that are not counted: the other side's threads no longer wait for work, its data has left the
    caches. Long calls need no such care."""
    began = time.perf_counter()
    while True:
        spent = seconds(call)
        if spent > LONG or time.perf_counter() - began > SETTLING:
            return spent


@dataclass(frozen=True)
class Timed:
    """One row of a table.

    Attributes:
      ours, theirs: seconds, pair by pair. setting: which of theirs was fastest. compile_seconds: our first call less a later one.
      per: what one call handles (tokens, patches, pictures, bytes) and how many of them.
    """

    name: str
    ours: list[float]
    theirs: list[float]
    setting: str = ""
    compile_seconds: float = 0.0
    per: tuple[float, str] = (1.0, "call")
    goal: float = 1.0
    note: str = field(default="")

    @property
    def ratio(self) -> float:
        """Of medians, theirs to ours: above 1 ours is faster."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a pair."""
        ratios = [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        return min(ratios), max(ratios)


def fastest(settings: Mapping[str, Call]) -> tuple[str, Call]:
    """The setting with the quickest of two calls after a first that warms up."""
    if len(settings) == 1:
        return next(iter(settings.items()))
    best = {name: min(seconds(call) for _ in range(3)) for name, call in settings.items()}
    name = min(best, key=lambda name: best[name])
    return name, settings[name]


def compare(
    name: str,
    ours: Call,
    theirs: Mapping[str, Call],
    *,
    pairs: int,
    per: tuple[float, str],
    goal: float = 1.0,
    limit: float = 30.0,
    before: Call | None = None,
) -> Timed:
    """Warms up both sides, chooses their fastest setting, and times pairs until there are `pairs`, or `limit` seconds and three.

    Args:
      before: is called, untimed, before each timed call, which then is not repeated until it settles.
    """

    def timed(call: Call) -> float:
        if before is None:
            return settled_seconds(call)
        before()
        return seconds(call)

    first = timed(ours) if before is not None else seconds(ours)
    setting, other = fastest(theirs)
    for call in (other, ours):
        timed(call)
    times: dict[Call, list[float]] = {ours: [], other: []}
    began = time.perf_counter()
    for i in range(pairs):
        if i >= 3 and time.perf_counter() - began > limit:
            break
        for call in (ours, other) if i % 2 == 0 else (other, ours):
            times[call].append(timed(call))
    compiled = max(0.0, first - statistics.median(times[ours]))
    return Timed(name, times[ours], times[other], setting, compiled, per, goal)
