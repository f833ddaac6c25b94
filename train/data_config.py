"""Where records come from and how they become batches: the `data` section of a training config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qvlmoe_jax.errors import ConfigError

MOST_WAITING = 4096
"""Past this a batch's gaps are long filled, and the first one only waits: an endless repetition would be read endlessly."""


@dataclass(frozen=True)
class SourceConfig:
    """One file of records.

    Attributes:
      path: `.jsonl`, `.json` (a list) or `.parquet`.
      root: the directory that relative picture and video paths start from; None = the file's own.
      weight: share of the mixture, relative to the other sources'. Either every source has one (then the mixture never
        ends and a small source repeats more often) or none has (then the sources are joined and an epoch visits every
        record once).
      format: how a record is spelled; `auto` reads it off each record's keys.
    """

    path: str
    root: str | None = None
    weight: float | None = None
    format: Literal["auto", "messages", "conversations"] = "auto"

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight = {self.weight} of {self.path}, expected a positive number")


@dataclass(frozen=True)
class DataConfig:
    """Records to batches of one fixed shape. Sizes are of the whole batch, over all processes.

    Attributes:
      sources: the files.
      sequence_length: T, tokens in a text row; a longer record is a bad one.
      batch_rows: B, text rows of a microbatch.
      accumulation: A, microbatches of a step; every array of a batch leads with it.
      vision_groups: G; each group is a stream of its own: every G-th record, packed into B/G text rows and their vision rows. It
        divides batch_rows and is a multiple of the mesh's batch shards (data x fsdp x expert); None = as many as the mesh had
        when the run began. Batches depend on it, and on no number of processes.
      vision_rows: R, vision rows of a group; 0 = text only.
      row_patches: P, patches of a vision row; a multiple of spatial_merge_size^2. A frame with more is a bad record.
      epochs: passes over the records; None = without end.
      shuffle: a new order each epoch, by `seed`. False keeps the files' order.
      label_newline: also learn the newline that follows an assistant turn's `<|im_end|>`.
      max_bad_records: how many different records a training process may skip before the run stops.
      lookahead: documents of a group that may wait for the next batch while later ones fill this one's gaps; decoded, in memory.
      workers: processes that decode for each training process, rounded up to a multiple of its groups; 0 decodes in the training
        process. The batches are the same either way.
      prefetch: batches made ahead by a thread.
      cache_dir: where a Parquet file's random-access copy lives; None = `$XDG_CACHE_HOME/qvlmoe_jax` or `~/.cache/qvlmoe_jax`.
    """

    sources: tuple[SourceConfig, ...]
    sequence_length: int = 2048
    batch_rows: int = 1
    accumulation: int = 1
    vision_groups: int | None = None
    vision_rows: int = 1
    row_patches: int = 4096
    epochs: int | None = None
    shuffle: bool = True
    seed: int = 0
    label_newline: bool = False
    max_bad_records: int = 100
    lookahead: int = 32
    workers: int = 0
    prefetch: int = 2
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty, expected at least one file of records")
        least = {"vision_rows": 0, "max_bad_records": 0, "seed": 0, "lookahead": 0, "workers": 0, "prefetch": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < least.get(field.name, 1):
                raise ConfigError(f"{field.name} = {value}, expected at least {least.get(field.name, 1)}")
        if self.lookahead > MOST_WAITING:
            raise ConfigError(
                f"lookahead = {self.lookahead}, expected at most {MOST_WAITING}: documents wait in memory, decoded, pictures too"
            )
        if self.vision_groups and self.batch_rows % self.vision_groups:
            raise ConfigError(f"batch_rows = {self.batch_rows} is not a multiple of vision_groups = {self.vision_groups}")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            missing = self.sources[weighted.index(False)].path
            raise ConfigError(f"{missing} has no weight, but other sources have one; expected all of them or none")
        if any(weighted) and self.epochs is not None:
            raise ConfigError(f"epochs = {self.epochs}, but a mixture with weights has no end; expected epochs: null")

    def num_groups(self, batch_shards: int, began_with: int | None = None) -> int:
        """G on a mesh of so many batch shards.

        Args:
          began_with: G of the run that is resumed: its streams go on, whatever the mesh.
        Raises:
          ConfigError: G cannot be spread over the mesh or the rows, or is not the resumed run's.
        """
        if began_with and self.vision_groups not in (None, began_with):
            raise ConfigError(
                f"vision_groups = {self.vision_groups}, but the run has dealt its records to {began_with} groups; expected "
                f"{began_with} or null"
            )
        groups = began_with or self.vision_groups or batch_shards
        if groups % batch_shards:
            raise ConfigError(
                f"{groups} vision groups cannot be spread over the mesh's {batch_shards} batch shards (data x fsdp x expert); "
                + ("choose a mesh whose batch shards divide them" if began_with else "expected a multiple in vision_groups")
            )
        if self.batch_rows % groups:
            raise ConfigError(f"batch_rows = {self.batch_rows} is not a multiple of the {groups} vision groups")
        return groups
