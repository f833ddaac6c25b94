"""What can go wrong in a run besides its config."""

from qvlmoe_jax.errors import QvlmoeError


class TrainingError(QvlmoeError):
    """A run cannot go on: no usable checkpoint, too many non-finite steps, an optional package that is not installed."""


class DoesNotFit(TrainingError):
    """A planned step needs more memory than a device has, as the compiler says."""
