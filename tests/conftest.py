"""Set before jax is imported: the CPU, as eight devices (the sharding tests need a mesh). And a summary of measured errors."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # jax numbers all collectives of a shard_map alike: where XLA runs two at once, devices mix them up
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        # eight devices share the machine's cores: one that waits 40 seconds for the others is not yet a deadlock to abort on
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
# XLA's pool has a thread for each core or device, whichever are more. A device may wait in several collectives at once, and when
# all threads wait, those that would release them never run.
os.environ["NPROC"] = "64"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub is a mistake

import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run and machine: a red test is then a change of the code, not of the dice.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")

MEASURED = pytest.StashKey[dict[str, float]]()


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """`record(what, value)` keeps the largest value seen for the summary at the end of the run."""
    values = request.config.stash.setdefault(MEASURED, {})

    def keep(what: str, value: float) -> None:
        values[what] = max(float(value), values.get(what, 0.0))

    return keep


_FINISHED = itertools.count(1)
MOST_MAPS = 30_000
"""Linux allows a process 65,530 memory maps, XLA takes several for each compiled program, and past the limit it aborts."""


@pytest.fixture(autouse=True)
def compiled_programs_fit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgets all compiled programs before they are too many for one process."""
    yield
    maps = Path("/proc/self/maps")
    looked_at = request.node.get_closest_marker("slow") or next(_FINISHED) % 40 == 0
    if looked_at and "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    values = config.stash.get(MEASURED, {})
    if values:
        terminalreporter.section("measured")
    for what, value in sorted(values.items()):
        terminalreporter.write_line(f"{what:<60} {value:.2e}")
