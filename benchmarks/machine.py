"""What every benchmark does before jax is imported, and what it says about where it ran.

Import this first. `--one-core` on the command line binds the process to one core, gives both sides one thread, and counts CPU
seconds: for a machine that others use, where waiting threads are otherwise what is measured.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tests/ is no installed package
ONE_CORE = "--one-core" in sys.argv
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if ONE_CORE:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
CORES = len(os.sched_getaffinity(0))


def clock() -> float:
    """Seconds: of CPU time with --one-core, else of wall time."""
    return time.process_time() if ONE_CORE else time.perf_counter()


def cpu_name() -> str:
    """As the kernel calls it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def versions() -> dict[str, str]:
    """Of everything that is measured."""
    import flax
    import jax
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, str | int | float]:
    """Name, cores used, how time was counted, and how busy the machine was."""
    how = "CPU seconds of one core" if ONE_CORE else "wall clock"
    return {"cpu": cpu_name(), "cores": CORES, "clock": how, "load": round(os.getloadavg()[0], 1)}
