"""CRC-32 (the polynomial of zlib's, gzip's and zip's) of a tensor's bytes. It is there to find damage, not to prove an origin."""

from __future__ import annotations

import os

import numpy as np
from isal import isal_zlib

from qvlmoe_jax.file_copy import mapped_source

READ_BYTES = 1 << 18
"""Stays in a core's cache between the read and the sum."""


def crc32(array: np.ndarray) -> int:
    """Of a contiguous array's bytes.

    Raises:
      OSError: the file under it was cut short.
    """
    value = 0
    if (source := mapped_source(array)) is None:
        data = array.reshape(-1).view(np.uint8).data
        for begin in range(0, array.nbytes, READ_BYTES):
            value = isal_zlib.crc32(data[begin : begin + READ_BYTES], value)
        return value
    # reading is cheaper than faulting a map's pages in, and never held in memory
    mapped, begin = source
    room, left = memoryview(bytearray(min(READ_BYTES, array.nbytes))), array.nbytes
    with mapped.path.open("rb", buffering=0) as file:
        while left:
            size = os.preadv(file.fileno(), [room[: min(left, READ_BYTES)]], begin)
            if not size:
                raise OSError(f"{mapped.path}: ends before the tensor that its header describes")
            value = isal_zlib.crc32(room[:size], value)
            begin, left = begin + size, left - size
    return value
