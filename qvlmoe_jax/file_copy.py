"""Arrays to files. What lies in a mapped file already is copied by the system from file to file, as `cp` does it."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
"""What file systems say that do not copy from file to file."""
WRITE_BYTES = 1 << 20
"""Of one call. For larger ones ext4 takes memory in larger pieces: a third of the speed where a host had to give them first."""


class MappedFile(mmap.mmap):
    """A whole file, read-only; pages are read when touched. Arrays over it can be traced back to it."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        with path.open("rb") as file:
            mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.path = path
        return mapped


def mapped_source(array: np.ndarray) -> tuple[MappedFile, int] | None:
    """The mapped file whose bytes a contiguous array is, and where they begin in it. None of any other array."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, MappedFile) or not array.flags.c_contiguous:
        return None
    return base, array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system's inside is one of this file: a failed write (a full disk) says of itself only that it failed."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8.

    Raises:
      OSError: the system's reason, and the file.
    """
    with naming(path):
        path.write_text(text, encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes.

    Raises:
      OSError: the system's reason, and the file.
    """
    with naming(target):
        shutil.copyfile(source, target)


def write_array(descriptor: int, array: np.ndarray) -> None:
    """Appends a contiguous array's bytes to an open file.

    Raises:
      OSError: the system's reason, a full disk for one.
    """
    data, done = array.reshape(-1).view(np.uint8).data, 0
    source = mapped_source(array) if array.nbytes >= mmap.PAGESIZE and hasattr(os, "copy_file_range") else None
    if source is not None:
        mapped, begin = source
        with mapped.path.open("rb") as file:
            try:
                while done < array.nbytes:
                    copied = os.copy_file_range(file.fileno(), descriptor, array.nbytes - done, begin + done)
                    if not copied:
                        break
                    done += copied
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
    while done < array.nbytes:
        done += os.write(descriptor, data[done : done + WRITE_BYTES])


def start_writing_back(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Has the system begin to bring these bytes (0: to the end) to the disk, and does not wait.

    On its own it lets gigabytes gather first, during which the disk rests.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
