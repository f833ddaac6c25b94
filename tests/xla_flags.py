"""XLA's flags for the tests' processes: `os.environ["XLA_FLAGS"]` before jax is imported."""

import os

from jaxlib import version

ONE_DEVICE = "--xla_cpu_multi_thread_eigen=false"
"""XLA:CPU's matrix products, spread over its thread pool, at times never end: every thread waits for another, with one device or
with eight (jaxlib 0.10.2; twice in some hundred runs that had just compiled their programs). On one thread each they end."""

SHARED_CORES = " ".join(
    [
        ONE_DEVICE,
        # devices share the machine's cores: one that waits 40 seconds for the others is not yet a deadlock to abort on
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
EIGHT_DEVICES = f"{SHARED_CORES} --xla_force_host_platform_device_count=8"

QUICK_COMPILE = ""
"""What `make test` and `make test-slow` add: jaxlib 0.10's older way to make machine code, in less than half the time (a test of
the router: 18 s for 42), of which tests need most of theirs. Later jaxlibs lack the flag. The comparisons with transformers
(`PARITY` in the Makefile) do without it: they run what users run."""
if os.environ.get("QUICK_COMPILE") and version.__version_info__[:2] == (0, 10):
    QUICK_COMPILE = "--xla_cpu_use_fusion_emitters=false"
