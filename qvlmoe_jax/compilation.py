"""Compiled programs outlive the process: the persistent cache of the commands, and what was compiled in spite of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax


def persistent_cache() -> Path:
    """Turns jax's persistent compilation cache on, for programs of any size; returns where it is.

    That is JAX_COMPILATION_CACHE_DIR if set, else qvlmoe_jax/xla in the user's cache directory (XDG_CACHE_HOME or ~/.cache).
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "qvlmoe_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


@dataclass
class CompileLog:
    """How many programs were compiled, and in how many seconds, since it was made.

    Programs found in the persistent cache count as loaded, not as compiled; the seconds are those of both.
    """

    programs: int = 0
    loaded: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._duration)  # pyright: ignore[reportArgumentType]
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.seconds += duration_secs

    def _event(self, event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.loaded += 1

    @property
    def compiled(self) -> int:
        """Programs that the persistent cache did not have."""
        return self.programs - self.loaded

    def __str__(self) -> str:
        made = f"{self.compiled} programs compiled" if self.compiled else "nothing compiled"
        return f"{made}, {self.loaded} from the cache, {self.seconds:.1f} s"
