"""Set before jax is imported: the CPU, as eight devices (the sharding tests need a mesh)."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub is a mistake

from hypothesis import settings

# The same examples on every run and machine: a red test is then a change of the code, not of the dice.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")
