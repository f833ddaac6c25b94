"""A training run in a process of its own, for tests that kill it: `python -m tests.train_program RUN MODEL STEPS`.

Prints a line per step (`train N ...`); the batches come from memory. The last line is the fingerprint of the final parameters.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import training
from train.checkpoints import fingerprint
from train.loop import train
from train.state import all_params


class SlowData(training.ListData):
    """Takes a moment per batch, so that a kill from outside lands between any two events."""

    def __next__(self) -> Any:
        time.sleep(0.02)
        return super().__next__()


def main(run: str, model: str, steps: str, changes: str = "{}") -> None:
    settings: Mapping[str, Any] = {"steps": int(steps), "checkpoint": {"every": 2, "keep": 3}, **json.loads(changes)}
    config = training.make_config(Path(run), Path(model), **settings)
    state = train(config, data=SlowData(training.mixed_batches(training.SMALL, 12)))
    print("final", int(state.step), json.dumps(fingerprint(all_params(state)), sort_keys=True), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
