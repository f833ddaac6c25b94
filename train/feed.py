"""Batches on their way from the data iterator to the device: one thread reads ahead, and counts what is in each batch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qvlmoe_jax import Batch
from qvlmoe_jax.sharding import shard_batch

PATIENCE = 5.0  # seconds


class DataIterator(Protocol):
    """Grain's protocol."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class OpenedData(DataIterator, Protocol):
    """With threads or workers to end."""

    def close(self) -> None: ...


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


def count(batch: Batch) -> Counts:
    """Counts a host Batch, with or without leading accumulation axis."""
    lengths = _segment_lengths(np.asarray(batch.segment_ids))
    frames = _segment_lengths(np.asarray(batch.patch_segment_ids))
    return Counts(
        tokens=int(lengths.sum()),
        slots=int(np.size(batch.segment_ids)),
        samples=len(lengths),
        token_pairs=int((lengths * (lengths + 1) // 2).sum()),
        patches=int(frames.sum()),
        patch_slots=int(np.size(batch.patch_segment_ids)),
        frame_pairs=int((frames**2).sum()),
    )


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
    """A batch on the device, the iterator's state after it, and what it holds."""

    batch: Batch
    state: Any
    counts: Counts


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """The batch on the device, or spread over the mesh."""
    return jax.device_put(batch) if mesh is None else shard_batch(batch, mesh)


class Interrupted(Exception):
    """The loop was asked to stop while it waited for data."""


class Feed:
    """Reads ahead of the training loop in one thread.

    Iterating gives `Fed`s in order; an error of the iterator is raised where its batch would have come. `waited` is the time
    the loop stood still for data, in seconds. When `stop` says so while there is no batch yet, `Interrupted` is raised: data that
    never come must not keep a run from leaving.
    """

    def __init__(
        self, iterator: DataIterator, *, mesh: Mesh | None = None, ahead: int = 2, stop: Callable[[], bool] = lambda: False
    ):
        self.waited = 0.0
        self._asked = stop
        self._iterator, self._mesh = iterator, mesh
        self._queue: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Fed:
        start = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=0.2)
                break
            except queue.Empty:
                if self._asked():
                    raise Interrupted from None
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._queue.put(item)  # the next call gets it too
            raise item
        return item

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
                batch = next(self._iterator)
                state = self._iterator.get_state()
                self._queue.put(Fed(place(batch, self._mesh), state, count(batch)))
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._queue.put(error)
