"""Checkpoints of a run: `RUN/checkpoints/STEP`, written in the background by Orbax, checked when read.

Each holds `state` (plain nested dicts: `params` of the whole model, or a LoRA run's adapters; optimizer, counters, key) and
`loop` (JSON: the data streams' states and a fingerprint of every array). A damaged checkpoint is reported, moved aside, and the
one before is used. Nothing in it knows of meshes or processes: any others can go on from it. With several processes all methods
are collectives.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from qvlmoe_jax.checkpoint import ARRAYS_DIR, load_shards
from qvlmoe_jax.orbax_store import OrbaxArrays
from qvlmoe_jax.param_tree import flatten, nest
from train import processes
from train.config import CheckpointConfig
from train.errors import TrainingError
from train.optim import join
from train.state import TrainState

log = logging.getLogger("train")

_POLICIES = ocp.training.preservation_policies


def _optimizer_tree(opt_state: Any) -> tuple[dict[str, Any], Any]:
    """optax's named tuples as nested dicts by field name or position, and what puts them back."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    names = ["/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path) for path, _ in leaves]
    return nest(dict(zip(names, (leaf for _, leaf in leaves), strict=True))), (treedef, names)


def to_tree(state: TrainState) -> dict[str, Any]:
    """The state as it lies on disk."""
    return {
        "params": join(state.params, state.frozen),
        "optimizer": _optimizer_tree(state.opt_state)[0],
        **({} if state.router_bias is None else {"router": {"bias": state.router_bias}}),
        "counters": {name: getattr(state, name) for name in ("step", "bad_steps", "bad_in_a_row")},
        "rng": state.rng,
    }


def from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `to_tree`, with the structure of `like`."""
    params = flatten(tree["params"])
    treedef, names = _optimizer_tree(like.opt_state)[1]
    optimizer = flatten(tree["optimizer"])
    return TrainState(
        params=nest({path: params[path] for path in flatten(like.params)}),
        frozen=nest({path: params[path] for path in flatten(like.frozen)}),
        opt_state=jax.tree_util.tree_unflatten(treedef, [optimizer[name] for name in names]),
        router_bias=None if like.router_bias is None else tree["router"]["bias"],
        rng=tree["rng"],
        **tree["counters"],
    )


@jax.jit
def _sums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        width = array.dtype.itemsize * 8
        words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        place = jnp.zeros(words.shape, jnp.uint32)
        for dim, size in enumerate(words.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

    return {path: one(array) for path, array in flat.items()}


def fingerprint(tree: Mapping[str, Any]) -> dict[str, list[Any]]:
    """`path -> [sum, shape, dtype]`: a position-weighted sum of the array's bits modulo 2^32, the same for any sharding.

    A changed bit always changes it (the weights are odd), so what Orbax reads back is known to be what was written.
    """
    flat = flatten(tree)
    sums = jax.device_get(_sums(flat))
    return {path: [int(sums[path]), list(leaf.shape), str(leaf.dtype)] for path, leaf in flat.items()}


class _Damaged(Exception):
    """A checkpoint that does not read back, in any of the processes."""


def _whole(read: Callable[[], Any]) -> Any:
    """What `read` returns, if it does so in every process; else `_Damaged` in all."""
    value, reason = None, None
    try:
        value = read()
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    reasons = [said for said in processes.gather(reason) if said is not None]
    if reasons:
        raise _Damaged(reasons[0])
    return value


def _load(directory: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays on disk, sharded as those of `expected` are; each process reads its own shards."""
    arrays = OrbaxArrays(directory)
    loaded = {}
    for path, leaf in flatten(expected).items():
        if path not in arrays.names or arrays.shapes[path] != leaf.shape:
            raise ValueError(f"{path!r} is not there as {list(leaf.shape)}")

        def read(index: tuple[slice, ...], path: str = path) -> np.ndarray:
            return arrays.read(path, index)

        # A copy: the step donates its state, and on the CPU jax may share the buffer it was given.
        loaded[path] = jnp.copy(load_shards(read, leaf.shape, leaf.dtype, leaf.sharding))
    return nest(loaded)


class Checkpoints:
    """Those of one run. Use as a context manager: leaving it waits for the save in progress."""

    def __init__(self, run: str | Path, config: CheckpointConfig, *, adapters: bool = False):
        """`adapters`: the frozen parameters are a base that is read from elsewhere, and are not kept."""
        self.run = Path(run).resolve()
        self.directory = self.run / "checkpoints"
        self.config, self.adapters = config, adapters
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, Any] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir())

    def save(self, step: int, state: TrainState, loop: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Copies the state to the host and writes it in the background (waiting for the save before it, if need be)."""
        if self._checkpointer is None:
            self._checkpointer = self._open()
        self.wait()
        tree = to_tree(self._kept(state))
        saving = self._checkpointer.save_checkpointables_async(
            step,
            {"state": tree, "loop": {**loop, "arrays": fingerprint(tree)}},
            force=True,
            overwrite=step in processes.gather(self.steps())[0],
            metrics=None if metrics is None else dict(metrics),
        )
        self._pending = step, saving

    def _kept(self, state: TrainState) -> TrainState:
        return dataclasses.replace(state, frozen={}) if self.adapters else state

    def wait(self) -> None:
        """Until the save in progress is on disk.

        Raises:
          TrainingError: it could not be written: a full disk, a directory without permission.
        """
        if self._pending is None:
            return
        (step, saving), self._pending = self._pending, None
        try:
            saving.result()
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
            self._checkpointer = None  # closed, it would raise the error once more
            whole = self.steps()
            start = f"step {whole[-1]}" if whole else "the beginning"
            raise TrainingError(
                f"the checkpoint of step {step} was not written ({str(error).splitlines()[0]}); once the cause is mended the "
                f"same command goes on from {start}"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint as `(state, loop)`, or None when the run has none.

        Args:
          like: the state of step 0: structure, dtypes and shardings.
        Raises:
          TrainingError: the checkpoints belong to another model, optimizer or set of frozen parameters; or all are damaged.
        """
        found = processes.gather(self.steps())[0]
        for step in reversed(found):
            try:
                state, loop = self._read(step, self._kept(like))
                return (dataclasses.replace(state, frozen=like.frozen) if self.adapters else state), loop
            except _Damaged as damaged:
                if processes.is_first():
                    aside = self._move_aside(step)
                    log.warning("checkpoint of step %d is damaged (%s); moved to %s, trying the one before", step, damaged, aside)
                processes.exchange(step)  # none looks for the next one before this one is away
        if found:
            raise TrainingError(
                f"{self.directory}: all {len(found)} checkpoints are damaged, expected one that reads back; start anew in "
                "another run directory"
            )
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        path = self.directory / str(step)
        loop = _whole(lambda: ocp.load_checkpointables(str(path), {"loop": None})["loop"])
        expected = to_tree(like)
        stored = loop.pop("arrays")
        here = {p: [list(leaf.shape), str(leaf.dtype)] for p, leaf in flatten(expected).items()}
        different = sorted(p for p in here.keys() | stored.keys() if here.get(p) != (stored[p][1:] if p in stored else None))
        if different:
            raise TrainingError(
                f"{path}: {len(different)} arrays are not this config's, first {different[0]!r}; expected the model, optimizer, "
                "dtypes and frozen parameters it was written with; use another run directory for a changed config"
            )
        # Not by Orbax, whose processes wait for one another inside: where one finds damage, the others would wait in vain.
        tree = _whole(lambda: _load(path / ARRAYS_DIR, expected))
        changed = [p for p, value in fingerprint(tree).items() if value != stored[p]]
        if changed:
            raise _Damaged(f"{len(changed)} arrays differ from what was written, first {changed[0]!r}")
        return from_tree(tree, like), loop

    def _move_aside(self, step: int) -> Path:
        aside = self.run / "damaged_checkpoints"
        aside.mkdir(exist_ok=True)
        number = 0
        while (target := aside / f"{step}.{number}").exists():
            number += 1
        os.rename(self.directory / str(step), target)
        return target

    def _open(self) -> ocp.training.Checkpointer:
        keep: list[Any] = [_POLICIES.LatestN(self.config.keep)]
        name = self.config.best_metric
        if self.config.best:
            keep.append(
                _POLICIES.BestN(
                    get_metric_fn=lambda metrics: metrics.get(name, -np.inf if "loss" not in name else np.inf),
                    reverse="loss" in name,
                    n=self.config.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        policy: Any = _POLICIES.AnyPreservationPolicy(keep)
        return ocp.training.Checkpointer(str(self.directory), preservation_policy=policy, cleanup_tmp_directories=True)
