"""Set before jax is imported: the CPU, as eight devices (the sharding tests need a mesh). And a summary of measured errors."""

from __future__ import annotations

import os

from tests.xla_flags import EIGHT_DEVICES, QUICK_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES} {QUICK_COMPILE}"
# XLA's pool has a thread for each core or device, whichever are more. A device may wait in several collectives at once, and when
# all threads wait, those that would release them never run.
os.environ["NPROC"] = "64"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub is a mistake

import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """jax's persistent cache, which the commands turn on: runs of one program in a module compile it once."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(directory: str | None, least_seconds: float) -> None:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
        compilation_cache.reset_cache()

    use(str(tmp_path_factory.mktemp("xla")), 0.2)
    yield
    use(None, 1.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its values to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["measured"] = session.config.stash.get(MEASURED, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes a worker's values; a worker that died has none."""
    values = node.config.stash.setdefault(MEASURED, {})
    for what, value in getattr(node, "workeroutput", {}).get("measured", {}).items():
        values[what] = max(value, values.get(what, 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    values = config.stash.get(MEASURED, {})
    if values:
        terminalreporter.section("measured")
    for what, value in sorted(values.items()):
        terminalreporter.write_line(f"{what:<60} {value:.2e}")
