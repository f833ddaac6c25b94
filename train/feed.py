"""Batches on their way from the data iterator to the devices: one thread reads ahead, and counts what is in each batch.

A process has only the rows of the vision groups that its devices hold. Together the processes' rows are one global batch.
"""

from __future__ import annotations

import base64
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qvlmoe_jax import Batch
from qvlmoe_jax.sharding import BATCH, batch_shardings, fit
from train import processes
from train.errors import TrainingError

PATIENCE = 5.0  # seconds


def row_axis(path: Any) -> int:
    """Which axis of a Batch's leaf `[A,...]` (by its key path) holds text rows or vision groups."""
    return 2 if path[-1].name == "position_ids" else 1


@dataclass(frozen=True)
class Shares:
    """How the rows of a global batch are dealt: group g of G holds text rows g*B/G .. (g+1)*B/G - 1 and their vision rows.

    Attributes:
      num_groups: G. held: the groups that this process's devices hold rows of, ascending. counted: those of them that no process
        before this one holds too, so that sums over processes count each group once.
    """

    num_groups: int
    held: tuple[int, ...]
    counted: tuple[int, ...]

    @classmethod
    def whole(cls, num_groups: int = 1) -> Shares:
        """One process, all groups."""
        return cls(num_groups, tuple(range(num_groups)), tuple(range(num_groups)))

    @classmethod
    def same_everywhere(cls) -> Shares:
        """Every process has the whole batch, as one group; the first counts it."""
        return cls(1, (0,), (0,) if processes.is_first() else ())

    @classmethod
    def on(cls, mesh: Mesh | None, num_groups: int) -> Shares:
        """As the mesh spreads them: G is a multiple of its batch shards."""
        if mesh is None:
            return cls.whole(num_groups)
        sharding = NamedSharding(mesh, fit((BATCH,), (num_groups,), mesh))
        holders: dict[int, set[int]] = {}
        for device, index in sharding.devices_indices_map((num_groups,)).items():
            for group in range(num_groups)[index[0]]:
                holders.setdefault(group, set()).add(device.process_index)
        here = jax.process_index()
        held = tuple(sorted(group for group, who in holders.items() if here in who))
        return cls(num_groups, held, tuple(group for group in held if min(holders[group]) == here))


class DataIterator(Protocol):
    """Grain's protocol, for whole batches: every process gives the same ones."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Data(Protocol):
    """This process's rows of one batch after the other.

    `shares` says which rows these are; `empty` is fed when they have ended and another process's have not. States are kept by
    group (its number as a string), as JSON: any number of processes can go on from them.
    """

    @property
    def shares(self) -> Shares: ...

    @property
    def empty(self) -> Batch | None: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, states: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class WholeBatches:
    """Whole batches from anywhere, the same in every process, as `Data`."""

    empty = None  # they end everywhere at once

    def __init__(self, batches: DataIterator | Iterable[Batch]):
        self.shares = Shares.same_everywhere()
        given: Any = batches
        self._batches = given if hasattr(given, "__next__") else iter(given)

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """An iterator without a state has an empty one."""
        return {"0": encode_iterator(getattr(self._batches, "get_state", dict)())}

    def set_state(self, states: Mapping[str, Any]) -> None:
        """The inverse of `get_state`."""
        self._batches.set_state(decode_iterator(states["0"]))

    def close(self) -> None:
        """Closes what can be closed."""
        getattr(self._batches, "close", lambda: None)()


def encode_iterator(state: Any) -> Any:
    """An iterator's state (dict or bytes) as JSON."""
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return json.loads(json.dumps(state, default=lambda value: value.item() if hasattr(value, "item") else str(value)))


def decode_iterator(state: Any) -> Any:
    """The inverse of `encode_iterator`."""
    return base64.b64decode(state["base64"]) if isinstance(state, dict) and state.keys() == {"base64"} else state


@dataclass(frozen=True)
class Counts:
    """What a host Batch holds; sums over all its rows.

    Attributes:
      tokens, slots: valid text columns, and all. samples: documents. token_pairs: sum over documents of length * (length+1) / 2.
      patches, patch_slots: the same for vision. frame_pairs: sum over frames of patches^2.
    """

    tokens: int = 0
    slots: int = 0
    samples: int = 0
    token_pairs: int = 0
    patches: int = 0
    patch_slots: int = 0
    frame_pairs: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def count(batch: Batch, shares: Shares | None = None) -> Counts:
    """Counts a host Batch; with `shares`, the rows `[A,rows,...]` of the groups that this process counts."""
    texts, patches = np.asarray(batch.segment_ids), np.asarray(batch.patch_segment_ids)
    if shares is not None and shares.counted != shares.held:
        own = [place for place, group in enumerate(shares.held) if group in shares.counted]
        texts, patches = (_of_groups(rows, len(shares.held))[:, own] for rows in (texts, patches))
    lengths, frames = _segment_lengths(texts), _segment_lengths(patches)
    return Counts(
        tokens=int(lengths.sum()),
        slots=texts.size,
        samples=len(lengths),
        token_pairs=int((lengths * (lengths + 1) // 2).sum()),
        patches=int(frames.sum()),
        patch_slots=patches.size,
        frame_pairs=int((frames**2).sum()),
    )


def _of_groups(rows: np.ndarray, groups: int) -> np.ndarray:
    """`[A,rows,...]` as `[A,groups,rows of a group,...]`."""
    return rows.reshape(rows.shape[0], groups, rows.shape[1] // groups, *rows.shape[2:])


def _segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Lengths of all segments (not padding, 0), one row of the last axis at a time."""
    if not segment_ids.size:
        return np.zeros(0, np.int64)
    rows = segment_ids.reshape(-1, segment_ids.shape[-1]).astype(np.int64)
    top = int(rows.max()) + 1
    counts = np.bincount((rows + np.arange(len(rows))[:, None] * top).reshape(-1), minlength=len(rows) * top).reshape(-1, top)
    return counts[:, 1:][counts[:, 1:] > 0]


@dataclass(frozen=True)
class Fed:
    """A batch on the devices, the states of this process's streams after it, and what it holds."""

    batch: Batch
    state: dict[str, Any]
    counts: Counts


def place(batch: Batch, mesh: Mesh | None, shares: Shares) -> Batch:
    """The global batch `[A,...]` on the devices, from this process's rows of it. No collective: any thread may call it."""
    if mesh is None:
        return jax.device_put(batch)
    held = len(shares.held)

    def whole(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        axis, shape = row_axis(path), np.shape(leaf)
        rows = shape[axis] // held * shares.num_groups
        return jax.ShapeDtypeStruct((*shape[:axis], rows, *shape[axis + 1 :]), leaf.dtype)

    def put(path: Any, leaf: np.ndarray, target: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        axis, of_group = row_axis(path), leaf.shape[row_axis(path)] // held

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[axis].indices(target.shape[axis])
            # Groups that a device holds follow one another, and so they do in `held`.
            first = start if not of_group else shares.held.index(start // of_group) * of_group + start % of_group
            return leaf[(*index[:axis], slice(first, first + stop - start), *index[axis + 1 :])]

        return jax.make_array_from_callback(target.shape, sharding, piece)

    targets = jax.tree_util.tree_map_with_path(whole, batch)
    return jax.tree_util.tree_map_with_path(put, batch, targets, batch_shardings(targets, mesh))


class Interrupted(Exception):
    """A process was asked to stop: all stop before the same batch."""


_READY, _ENDED, _STOPPED, _FAILED = range(4)


class Feed:
    """Reads ahead of the training loop in one thread, and keeps the processes together.

    Iterating gives `Fed`s in order, in all processes or in none: when the data of all have ended (before that, ended ones give
    empty rows), when `stop` says so in any (`Interrupted`; also while it waits: data that never come must not keep a run from
    leaving), or when reading fails in any (its error, in the others a TrainingError of its words).

    Attributes:
      waited: the time the loop stood still for data here, in seconds. failed: reading failed in some process, and all know.
    """

    def __init__(self, data: Data, *, mesh: Mesh | None = None, ahead: int = 2, stop: Callable[[], bool] = lambda: False):
        self.waited, self.failed = 0.0, False
        self._asked = stop
        self._data, self._mesh = data, mesh
        self._state = data.get_state()  # after the last batch
        self._queue: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Fed:
        start = time.perf_counter()
        item = self._take()
        self.waited += time.perf_counter() - start
        own = _STOPPED if item is None else _READY if isinstance(item, Fed) else _ENDED
        if isinstance(item, BaseException) and not isinstance(item, StopIteration):
            own = _FAILED
        everyone = processes.exchange(own)
        if _FAILED in everyone:
            words = processes.gather(str(item) if own == _FAILED else None)
            self.failed = True
            raise item if own == _FAILED else TrainingError(next(w for w in words if w is not None))  # pyright: ignore[reportGeneralTypeIssues]
        if _STOPPED in everyone:
            raise Interrupted
        if _READY not in everyone:
            raise StopIteration
        if isinstance(item, Fed):
            self._state = item.state
            return item
        assert self._data.empty is not None
        return Fed(place(self._data.empty, self._mesh, self._data.shares), self._state, Counts())

    def _take(self) -> Fed | BaseException | None:
        """The next batch, or what ended the data; None when asked to stop."""
        while not self._asked():
            try:
                item = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._queue.put(item)  # the next call gets it too
            return item
        return None

    def close(self) -> None:
        """Stops reading; waits for the batch being read, but not for ever."""
        self._stop.set()
        patience = time.perf_counter() + PATIENCE
        while self._thread.is_alive() and time.perf_counter() < patience:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _read(self) -> None:
        try:
            while not self._stop.is_set():
                batch = next(self._data)
                state = self._data.get_state()
                self._queue.put(Fed(place(batch, self._mesh, self._data.shares), state, count(batch, self._data.shares)))
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._queue.put(error)
