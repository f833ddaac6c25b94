"""The data pipeline: records -> documents -> packed batches, as a Grain iterator that resumes at the exact next sample.

Each vision group (some text rows and their vision rows) is a stream of its own: group g of G takes every G-th record of one
global order and packs them for itself. A process runs the streams of the groups that its devices hold, so the batches depend on
G alone. Decoding may run in worker processes; packing runs here, on the stream in its order, so the batches are the same with
any number of workers. A stream's state is the number of records taken, those that wait for the next batch, and the bad ones
seen: a few numbers, whatever the size of the data.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import grain.experimental
import jax
import numpy as np

from qvlmoe_jax.batch import Batch
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.processor import Processor
from train.data_config import DataConfig
from train.documents import Document, DocumentMaker
from train.errors import TrainingError
from train.feed import Shares, row_axis
from train.packing import Packer
from train.records import Records

log = logging.getLogger("train")

READ_THREADS = 4  # in this process; a worker process uses one


def make_data(
    config: DataConfig, model_config: Qwen3VLMoeConfig, processor: Processor, *, shares: Shares | None = None
) -> GroupedData:
    """The data of one process.

    Args:
      processor: of the checkpoint that is trained.
      shares: how many groups there are and which of them this process holds; None = all of `config.vision_groups` (or one).
    Raises:
      ConfigError: files or sizes that cannot work. While iterating, TrainingError: too many bad records, named.
    """
    unit = model_config.vision_config.merge_unit
    if config.vision_rows and config.row_patches % unit:
        raise ConfigError(f"row_patches = {config.row_patches}, expected a multiple of spatial_merge_size^2 = {unit}")
    shares = Shares.whole(config.num_groups(1)) if shares is None else shares
    records, enough = _order(config, shares.num_groups)
    documents = records.map(DocumentMaker(config, model_config, processor))
    group = _of_a_group(config, shares)

    def open_streams() -> grain.DatasetIterator[Batch]:
        bad = _BadRecords(config.max_bad_records)
        threads = max(1, READ_THREADS // len(shares.held))
        packer = Packer(group, model_config.vision_config)  # holds one batch at a time
        streams = {str(g): _Stream(documents[g :: shares.num_groups], group, packer, bad, enough, threads) for g in shares.held}
        return _GroupsIterator(streams, bad)

    packed: grain.IterDataset[Batch] = _GroupsDataset(open_streams)
    if config.prefetch:
        packed = grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=config.prefetch)
    return GroupedData(iter(packed), shares, Packer(group, model_config.vision_config).finish())


def _of_a_group(config: DataConfig, shares: Shares) -> DataConfig:
    """The sizes of one stream's batches, and its part of the process's threads and workers."""
    rows, left = divmod(config.batch_rows, shares.num_groups)
    assert not left
    return dataclasses.replace(config, batch_rows=rows, vision_groups=1, workers=-(-config.workers // len(shares.held)))


def _order(config: DataConfig, num_groups: int) -> tuple[grain.MapDataset[Any], int]:
    """The records in the order in which they are dealt to the groups, over all epochs; and how many in a row surely hold every
    record once."""

    def shuffled(records: Records, seed: int) -> grain.MapDataset[Any]:
        dataset = grain.MapDataset.source(records)
        return dataset.shuffle(seed % 2**32) if config.shuffle else dataset

    if config.sources[0].weight is None:
        joined = shuffled(Records(config.sources, cache_dir=config.cache_dir), config.seed)
        if len(joined) < num_groups:
            raise ConfigError(f"{len(joined)} records for {num_groups} vision groups, expected at least one for each")
        return joined.repeat(config.epochs), 2 * len(joined) - 1  # an epoch's good ones may be its first, the next one's its last
    # Repeating each source for itself, with a seed of its own, keeps the weights exact however different the sizes.
    parts = [Records([source], cache_dir=config.cache_dir) for source in config.sources]
    endless = [shuffled(part, config.seed + 7919 * i).repeat() for i, part in enumerate(parts)]
    weights = [source.weight for source in config.sources if source.weight is not None]  # all of them have one
    per_record = [len(part) / weight for part, weight in zip(parts, weights, strict=True)]
    return grain.MapDataset.mix(endless, weights=weights), math.ceil(2 * sum(weights) * max(per_record))


class GroupedData:
    """Batches of the groups that this process holds, every array with a leading A and their rows in the groups' order.

    A group whose records have ended is empty in the batches until all have. Close it to end its threads and workers.

    Attributes:
      shares: which groups these are. empty: a batch without documents.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], shares: Shares, empty_group: Batch):
        self.shares = shares
        self.empty = _side_by_side([empty_group] * len(shares.held))
        self._batches = batches

    def __iter__(self) -> GroupedData:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """By group (its number as a string): where its stream is. Exact, also when the number of workers changes."""
        return self._batches.get_state()

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Sets the streams held here; `states` may have others."""
        self._batches.set_state({str(g): states[str(g)] for g in self.shares.held})

    def close(self) -> None:
        """Ends threads and workers."""
        self._batches.close()


def _side_by_side(groups: Sequence[Batch]) -> Batch:
    """Batches `[A,rows,...]` of single groups as one."""
    if len(groups) == 1:
        return groups[0]
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: np.concatenate(leaves, axis=row_axis(path)), *groups)


class _GroupsDataset(grain.IterDataset[Batch]):
    """An `IterDataset`, so that Grain's thread can run ahead of it."""

    def __init__(self, open_streams: Callable[[], grain.DatasetIterator[Batch]]):
        super().__init__()
        self._open_streams = open_streams

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return self._open_streams()


class _GroupsIterator(grain.DatasetIterator[Batch]):
    """The streams of several groups, side by side."""

    def __init__(self, streams: dict[str, _Stream], bad: _BadRecords):
        super().__init__()
        self._streams, self._bad = streams, bad

    def __next__(self) -> Batch:
        filled, parts = False, []
        for stream in self._streams.values():
            filled |= stream.fill()
            parts.append(stream.packer.finish())
        if not filled:
            raise StopIteration
        return _side_by_side(parts)

    def get_state(self) -> dict[str, Any]:
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._bad.names = {name for own in state.values() for name in own["bad"]}
        for group, stream in self._streams.items():
            stream.set_state(state[group])

    def close(self) -> None:
        """Ends worker processes and threads."""
        for stream in self._streams.values():
            stream.close()
        super().close()


class _BadRecords:
    """Those that this process has met, in all its streams."""

    def __init__(self, limit: int):
        self._limit = limit
        self.names: set[str] = set()

    def count(self, own: dict[str, str], name: str, error: str) -> None:
        """Counts a bad record once, however many epochs and streams meet it.

        Args:
          own: the stream's, which gets it.
        Raises:
          TrainingError: too many.
        """
        own.setdefault(name, error)  # also where another stream has met it: what a stream keeps is its own, whoever is beside it
        if name not in self.names:
            self.names.add(name)
            log.warning("bad record %s %s; skipped (%d of at most %d)", name, error, len(self.names), self._limit)
            if len(self.names) > self._limit:
                newest = "; ".join(f"{name} {error}" for name, error in list(own.items())[-3:])
                raise TrainingError(
                    f"{len(self.names)} bad records, more than max_bad_records = {self._limit}. The last: {newest}"
                )


class _Stream:
    """One group's documents, read in order and packed. Positions count its documents since the first epoch's start."""

    def __init__(
        self,
        documents: grain.MapDataset[Document],
        config: DataConfig,
        packer: Packer,
        bad: _BadRecords,
        enough: int,
        threads: int,
    ):
        """
        Args:
          config: with the sizes and workers of this stream alone. enough: so many bad records in a row end the search for a good
            one. threads: that read and decode where there are no workers.
        """
        self.packer = packer
        self._documents, self._config, self._all_bad, self._enough, self._threads = documents, config, bad, enough, threads
        self._next = 0
        self._waiting: list[tuple[int, Document]] = []  # documents that the last batch had no room for, in order
        self._bad: dict[str, str] = {}
        self._reader: grain.DatasetIterator[Document] | None = None

    def fill(self) -> bool:
        """Packs the next batch; False when no document is left for it."""
        waiting, self._waiting = self._waiting, []
        for position, document in waiting:
            self._place(position, document)
        bad_in_a_row = 0  # of those read for this batch: its last one is good or the data's end, so the next has none to add to
        while not self.packer.full and len(self._waiting) <= self._config.lookahead:
            document = next(self._open_reader(), None)
            if document is None:
                break
            position, self._next = self._next, self._next + 1
            error = self._place(position, document)
            bad_in_a_row = 0 if error is None else bad_in_a_row + 1
            if bad_in_a_row >= self._enough:  # else an endless repetition would be searched endlessly
                raise TrainingError(f"{bad_in_a_row} records in a row are bad. The last: {document['name']} {error}")
        return not self.packer.empty

    def _place(self, position: int, document: Document) -> str | None:
        """Packs a good document or lets it wait. Counts a bad one, and returns what is wrong with it."""
        error = document["error"]
        if error is None and not self.packer.add(document):
            if not self.packer.empty:
                self._waiting.append((position, document))
                return None
            # More frames than a group's rows hold, although each is small enough.
            rows = f"{self._config.vision_rows} rows of {self._config.row_patches} patches"
            error = f"has more frames than a vision group of {rows} holds"
        if error is not None:
            self._all_bad.count(self._bad, document["name"], error)
        return error

    def _open_reader(self) -> grain.DatasetIterator[Document]:
        if self._reader is None:
            workers = self._config.workers
            threads = self._threads if not workers else 1
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
            remaining = self._documents[self._next :]
            if workers:
                _allow_workers()
                # As bytes, through a pipe: arrays would go through shared memory, of which containers often have 64 MiB, and
                # which outlives a killed process.
                sent = remaining.map(pickle.dumps).to_iter_dataset(options)
                received = sent.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16))
                self._reader = iter(received.map(pickle.loads))
            else:
                self._reader = iter(remaining.to_iter_dataset(options))
        return self._reader

    def get_state(self) -> dict[str, Any]:
        """A few numbers, and the bad records met."""
        return {"next": self._next, "waiting": [position for position, _ in self._waiting], "bad": dict(self._bad)}

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.close()
        furthest = max([int(state["next"]) - 1, *state["waiting"]])
        if furthest >= len(self._documents):
            raise TrainingError(
                f"the checkpoint was made after {furthest + 1} records of a vision group's data, which now has "
                f"{len(self._documents)}; expected the data it was made with, or more"
            )
        self._next, self._bad = int(state["next"]), dict(state["bad"])
        self._waiting = [(position, self._documents[position]) for position in state["waiting"]]

    def close(self) -> None:
        """Ends worker processes and threads."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _allow_workers() -> None:
    """Grain's workers read absl's flags, which a program without absl's own main never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
