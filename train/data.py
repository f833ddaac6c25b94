"""The data pipeline: records -> documents -> packed batches, as a Grain iterator that resumes at the exact next sample.

Each process takes every `process_count`-th record of one global order. Decoding may run in worker processes; packing runs here,
on the stream in its order, so the batches are the same with any number of workers. The iterator's state is the number of
records taken, those that wait for the next batch, and the bad ones seen: a few numbers, whatever the size of the data.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

import grain
import grain.experimental

from qvlmoe_jax.batch import Batch
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.processor import Processor
from train.data_config import DataConfig
from train.documents import Document, DocumentMaker
from train.errors import TrainingError
from train.packing import Packer
from train.records import Records

log = logging.getLogger("train")

READ_THREADS = 4  # in this process; a worker process uses one


def make_data(
    config: DataConfig, model_config: Qwen3VLMoeConfig, processor: Processor, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[Batch]:
    """The training data of one process.

    Args:
      processor: of the checkpoint that is trained.
    Returns:
      an iterator of numpy Batches, every array with a leading A (microbatches). `get_state` and `set_state` are exact, also
      when the number of workers changes. Close it to end its threads and workers.
    Raises:
      ConfigError: files or sizes that cannot work. While iterating, TrainingError: too many bad records, named.
    """
    unit = model_config.vision_config.merge_unit
    if config.vision_rows and config.row_patches % unit:
        raise ConfigError(f"row_patches = {config.row_patches}, expected a multiple of spatial_merge_size^2 = {unit}")
    records, different = _order(config, process_index, process_count)
    documents = records.map(DocumentMaker(config, model_config, processor))
    packed: grain.IterDataset[Batch] = _PackedDataset(
        documents, different, config, lambda: Packer(config, model_config.vision_config)
    )
    if config.prefetch:
        packed = grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=config.prefetch)
    return iter(packed)


def _order(config: DataConfig, process_index: int, process_count: int) -> tuple[grain.MapDataset[Any], int]:
    """This process's records in the order it will see them, over all epochs; and how many different ones these are."""
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index = {process_index}, expected 0 .. {process_count - 1}")

    def shuffled(records: Records, seed: int) -> grain.MapDataset[Any]:
        dataset = grain.MapDataset.source(records)
        return dataset.shuffle(seed % 2**32) if config.shuffle else dataset

    if config.sources[0].weight is None:
        joined = shuffled(Records(config.sources, cache_dir=config.cache_dir), config.seed)
        if len(joined) < process_count:
            raise ConfigError(f"{len(joined)} records for {process_count} processes, expected at least one for each")
        own = joined[process_index::process_count]
        return own.repeat(config.epochs), len(own)
    # Repeating each source for itself, with a seed of its own, keeps the weights exact however different the sizes.
    parts = [Records([source], cache_dir=config.cache_dir) for source in config.sources]
    endless = [shuffled(part, config.seed + 7919 * i).repeat() for i, part in enumerate(parts)]
    mixed = grain.MapDataset.mix(endless, weights=[source.weight for source in config.sources])  # pyright: ignore[reportArgumentType]
    return mixed[process_index::process_count], sum(map(len, parts))


class _PackedDataset(grain.IterDataset[Batch]):
    """Documents, packed. (An `IterDataset`, so that Grain's thread can run ahead of it.)"""

    def __init__(
        self, documents: grain.MapDataset[Document], different: int, config: DataConfig, make_packer: Callable[[], Packer]
    ):
        super().__init__()
        self._documents, self._different, self._config, self._make_packer = documents, different, config, make_packer

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _PackedIterator(self._documents, self._different, self._config, self._make_packer())


class _PackedIterator(grain.DatasetIterator[Batch]):
    """Reads documents in order and packs them. Positions count documents of this process since the first epoch's start."""

    def __init__(self, documents: grain.MapDataset[Document], different: int, config: DataConfig, packer: Packer):
        """
        Args:
          different: how many of the documents are not repetitions.
        """
        super().__init__()
        self._documents, self._different, self._config, self._packer = documents, different, config, packer
        self._next = 0
        self._waiting: list[tuple[int, Document]] = []  # documents that the last batch had no room for, in order
        self._bad: dict[str, str] = {}
        self._stream: grain.DatasetIterator[Document] | None = None

    def __next__(self) -> Batch:
        waiting, self._waiting = self._waiting, []
        for position, document in waiting:
            self._place(position, document)
        while not self._packer.full and len(self._waiting) <= self._config.lookahead:
            document = next(self._open_stream(), None)
            if document is None:
                break
            position, self._next = self._next, self._next + 1
            if document["error"] is None:
                self._place(position, document)
            else:
                self._count(document)
        if self._packer.empty:
            raise StopIteration
        return self._packer.finish()

    def _place(self, position: int, document: Document) -> None:
        if not self._packer.add(document):
            if self._packer.empty:  # more frames than a group's rows hold, although each is small enough
                rows = f"{self._config.vision_rows} rows of {self._config.row_patches} patches"
                self._count({**document, "error": f"has more frames than a vision group of {rows} holds"})
            else:
                self._waiting.append((position, document))

    def _count(self, document: Document) -> None:
        """Counts a bad record once, however many epochs meet it."""
        name, error = document["name"], document["error"]
        if name in self._bad:
            return
        self._bad[name] = error
        limit = self._config.max_bad_records
        log.warning("bad record %s %s; skipped (%d of at most %d)", name, error, len(self._bad), limit)
        if len(self._bad) > limit:
            newest = "; ".join(f"{name} {error}" for name, error in list(self._bad.items())[-3:])
            raise TrainingError(f"{len(self._bad)} bad records, more than max_bad_records = {limit}. The last: {newest}")
        if len(self._bad) == self._different:  # else an endless repetition would be searched for a good one, endlessly
            raise TrainingError(f"all {self._different} records are bad, expected one to train on. The last: {name} {error}")

    def _open_stream(self) -> grain.DatasetIterator[Document]:
        if self._stream is None:
            workers = self._config.workers
            threads = READ_THREADS if not workers else 1
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
            remaining = self._documents[self._next :]
            if workers:
                _allow_workers()
                # As bytes, through a pipe: arrays would go through shared memory, of which containers often have 64 MiB, and
                # which outlives a killed process.
                sent = remaining.map(pickle.dumps).to_iter_dataset(options)
                received = sent.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16))
                self._stream = iter(received.map(pickle.loads))
            else:
                self._stream = iter(remaining.to_iter_dataset(options))
        return self._stream

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "waiting": [position for position, _ in self._waiting], "bad": dict(self._bad)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._close_stream()
        furthest = max([int(state["next"]) - 1, *state["waiting"]])
        if furthest >= len(self._documents):
            raise TrainingError(
                f"the checkpoint was made after {furthest + 1} records of this process's data, which now has "
                f"{len(self._documents)}; expected the data it was made with, or more"
            )
        self._next, self._bad = int(state["next"]), dict(state["bad"])
        self._waiting = [(position, self._documents[position]) for position in state["waiting"]]

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Ends worker processes and threads."""
        self._close_stream()
        super().close()


def _allow_workers() -> None:
    """Grain's workers read absl's flags, which a program without absl's own main never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
