"""A run that ends before its last step keeps what it has: on SIGTERM, when the data end, when they fail."""

from __future__ import annotations

from typing import Any

from train import processes
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.errors import TrainingError
from train.feed import Fed
from train.state import TrainState


def keep(checkpoints: Checkpoints, done: int, config: TrainConfig, state: TrainState, fed: Fed | None) -> str | None:
    """Saves a run that ends early, after `done` steps, of which this process took the one fed by `fed`, or none. A collective.

    Returns:
      where it is saved, for a message; None where there is no step to save yet.
    """
    checkpoints.wait()
    if fed is not None and done not in processes.gather(checkpoints.steps())[0]:
        checkpoints.save(done, state, {"data": streams(fed)})
        checkpoints.wait()
    kept = processes.gather(checkpoints.steps())[0]  # and so no process leaves while another still writes
    return f"saved step {done} of {config.steps} in {checkpoints.directory / str(done)}" if done in kept else None


def ended(config: TrainConfig, done: int, saved: str | None, *, own_data: bool) -> TrainingError:
    """The error of data that end before the run does.

    Args:
      saved: of `keep`. own_data: they are those of `config.data`, whose streams go on when there are more epochs.
    """
    if saved is None:
        return TrainingError("the data ended before the first step, expected at least one batch")
    more = f", and the same command with data.epochs above {config.data.epochs} goes on from there" if own_data else ""
    return TrainingError(
        f"the data ended after {done} of {config.steps} steps; {saved}{more}; lower steps to {done} to end the run there"
    )


def streams(fed: Fed) -> list[Any]:
    """Where the streams of all groups are after a batch, in their order; those of this and the other processes."""
    states = {group: state for own in processes.gather(fed.state) for group, state in own.items()}
    return [states[str(group)] for group in range(len(states))]
