"""Files of records, opened for random access: an index of byte offsets stays in memory, the records stay on disk.

JSONL and JSON are read span by span. Parquet has no cheap access to one row, so it is copied once into an Arrow file of small
batches beside other caches. Nothing is mapped into memory: what is read is freed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qvlmoe_jax.errors import ConfigError
from train.data_config import SourceConfig

FIELDS = ("messages", "conversations", "system", "tools", "image", "images", "video", "videos")
"""The keys of a record that mean something (`train/formats.py`); a Parquet file's other columns are not read."""

_CHUNK = 1 << 22
_ARROW_BATCH_BYTES = 1 << 18


@dataclass(frozen=True)
class RawRecord:
    """One record as it lies in its file: `payload` is JSON text, or a Parquet row as a dict. `name` is file and record number."""

    name: str
    root: str
    format: str
    payload: bytes | dict[str, Any]


class _File(Protocol):
    """Random access to one file's payloads."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes | dict[str, Any]: ...
    def number(self, index: int) -> int: ...


class Records:
    """The records of several files, one after another. Picklable: workers open the files themselves."""

    def __init__(self, sources: Sequence[SourceConfig], *, cache_dir: str | None = None):
        """
        Raises:
          ConfigError: a file that is missing, has an unknown suffix, is no list of records, or holds none.
        """
        self._sources = tuple(sources)
        self._files = [_open(Path(source.path), cache_dir) for source in sources]
        self._ends = np.cumsum([len(file) for file in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawRecord:
        which = int(np.searchsorted(self._ends, index, side="right"))
        source, file = self._sources[which], self._files[which]
        local = int(index) - (int(self._ends[which - 1]) if which else 0)
        return RawRecord(
            name=f"{source.path}:{file.number(local)}",
            root=source.root if source.root is not None else str(Path(source.path).parent),
            format=source.format,
            payload=file.read(local),
        )


def _open(path: Path, cache_dir: str | None) -> _File:
    openers = {".jsonl": _JsonLines, ".json": _JsonList, ".parquet": lambda path: _Parquet(path, _cache(cache_dir))}
    if path.suffix not in openers:
        raise ConfigError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(openers)}")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist, expected a file of records")
    file = openers[path.suffix](path)
    if not len(file):
        raise ConfigError(f"{path} holds no records")
    return file


def _cache(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvlmoe_jax"


class _Spans:
    """Records that are byte ranges of a file. `numbers` are what a reader of the file would call them."""

    def __init__(self, path: Path, starts: np.ndarray, ends: np.ndarray, numbers: np.ndarray):
        self._path, self._starts, self._ends, self._numbers = path, starts, ends, numbers
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        return int(self._numbers[index])

    def read(self, index: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.pread(self._descriptor, end - start, start)  # no shared position, so threads may read at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # pyright: ignore[reportArgumentType]


class _JsonLines(_Spans):
    """One JSON object a line, numbered by line from 1; blank lines are no records."""

    def __init__(self, path: Path):
        starts, ends, white = _lines(path)
        record = np.ones(len(starts), bool)
        with path.open("rb") as file:
            for i in np.flatnonzero(white):  # only these can be blank, and few are
                file.seek(int(starts[i]))
                record[i] = bool(file.read(int(ends[i] - starts[i])).strip())
        keep = np.flatnonzero(record)
        super().__init__(path, starts[keep], ends[keep], keep + 1)


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each line: where it starts, where it ends (its line break not included), and whether it is empty or starts with white
    space."""
    is_white = np.isin(np.arange(256), list(b" \t\r\n\v\f"))
    starts, white = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    size, last = 0, b"\n"  # a line starts after a line break, and at the file's start
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            codes = np.frombuffer(last + chunk, np.uint8)
            first = np.flatnonzero(codes[:-1] == ord("\n")) + 1
            starts.append(first + (size - 1))
            white.append(is_white[codes[first]])
            size, last = size + len(chunk), chunk[-1:]
    start = np.concatenate(starts)
    end_of_last = size - 1 if last == b"\n" else size
    return start, np.append(start[1:] - 1, end_of_last)[: len(start)], np.concatenate(white)


class _JsonList(_Spans):
    """One JSON list, its elements numbered from 0. The whole text is in memory only while the elements are found."""

    def __init__(self, path: Path):
        # One character per byte: positions in the text are positions in the file, and JSON's own syntax is ASCII.
        text = path.read_bytes().decode("latin-1")
        decoder = json.JSONDecoder()
        at = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
        if text[at : at + 1] != "[":
            raise ConfigError(f"{path} does not begin with '[', expected a JSON list of records (one object per line is .jsonl)")
        spans, at = [], _skip(text, at + 1)
        try:
            while text[at : at + 1] != "]":
                end = decoder.raw_decode(text, at)[1]
                spans.append((at, end))
                at = _skip(text, end)
                if text[at : at + 1] == ",":
                    at = _skip(text, at + 1)
                elif text[at : at + 1] != "]":
                    raise json.JSONDecodeError("expected ',' or ']'", text, at)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is no valid JSON at byte {error.pos} (record {len(spans)}): {error.msg}") from None
        starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
        super().__init__(path, starts, ends, np.arange(len(spans)))


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


class _Parquet:
    """Rows of a Parquet file, numbered from 0, read from an Arrow copy in batches of about 256 KiB."""

    def __init__(self, path: Path, cache: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{FIELDS}".encode()).hexdigest()[:24]
        self._copy, self._reader = cache / f"{path.stem}-{key}.arrow", None
        try:
            source = pq.ParquetFile(path)
            if not {"messages", "conversations"} & {*source.schema_arrow.names}:
                names = ", ".join(source.schema_arrow.names) or "(none)"
                raise ConfigError(f"{path} has the columns {names}, expected messages or conversations")
            self._length = source.metadata.num_rows
            size = sum(source.metadata.row_group(i).total_byte_size for i in range(source.metadata.num_row_groups))
            # From what the file says of itself, so that every process cuts the copy alike.
            self._rows = int(np.clip(_ARROW_BATCH_BYTES * self._length // max(size, 1), 1, 1024))
            if not self._copy.exists():
                _copy_to_arrow(source, self._copy, self._rows)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's: no right to read, a full disk; without a number it is Arrow's, of damaged pages
            raise ConfigError(f"{path} cannot be read as Parquet: {error}") from None

    def __len__(self) -> int:
        return self._length

    def number(self, index: int) -> int:
        return index

    def read(self, index: int) -> dict[str, Any]:
        import pyarrow as pa

        if self._reader is None:
            self._reader = pa.ipc.open_file(pa.OSFile(str(self._copy)))
        batch, row = divmod(index, self._rows)
        return self._reader.get_batch(batch).slice(row, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def _copy_to_arrow(source: Any, target: Path, rows: int) -> None:
    """Appears by one rename, so processes that make it at the same time do not see each other's halves."""
    import pyarrow as pa

    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    os.close(handle)
    try:
        schema = pa.schema([field for field in source.schema_arrow if field.name in FIELDS])
        with pa.OSFile(partial, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            kept: list[Any] = []
            for batch in source.iter_batches(batch_size=max(rows, 64), columns=schema.names):
                kept.append(batch)
                table = pa.Table.from_batches(kept)
                whole = len(table) // rows * rows
                for start in range(0, whole, rows):
                    writer.write(table.slice(start, rows).combine_chunks().to_batches()[0])
                kept = table.slice(whole).to_batches()
            if kept:
                writer.write(pa.Table.from_batches(kept).combine_chunks().to_batches()[0])
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
