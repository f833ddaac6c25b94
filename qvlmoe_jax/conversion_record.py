"""`conversion.json`: where a converted directory came from, and what each tensor was. `convert.hf2jax` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import TABLE_VERSION
from qvlmoe_jax.local_files import read_json

WEIGHT_DTYPES = ("BF16", "F16", "F32")
CASTS = ("keep", "bfloat16", "float32")


def read_record(file: Path) -> dict[str, Any]:
    """The parsed record, checked for what its readers take for granted; a part may be absent.

    Raises:
      CheckpointError: it is not such a record, or another version of the table made it.
    """
    record = read_json(file)
    version = record.get("table_version") if isinstance(record, dict) else None
    if isinstance(version, bool) or version != TABLE_VERSION:
        raise CheckpointError(f"{file}: table_version is {version!r:.80}, expected {TABLE_VERSION}; convert the source again")

    def expect(good: bool, what: str, expected: str) -> None:
        if not good:
            raise CheckpointError(f"{file}: {what} is damaged, expected {expected}; convert the source again")

    dtype = record.setdefault("dtype", "keep")
    expect(dtype in CASTS, "dtype", f"one of {', '.join(CASTS)}")
    # float8 tensors are never kept, so a kept dtype is one that the arrays can have
    tensors = WEIGHT_DTYPES if dtype == "keep" else (*WEIGHT_DTYPES, "F8_E4M3")
    for part, dtypes in (("tensors", tensors), ("scales", ("F32", "BF16"))):
        entries = record.setdefault(part, {})
        expect(isinstance(entries, dict), part, "an object of tensor name -> dtype, shape and crc32")
        for name, entry in entries.items():
            good = isinstance(entry, dict) and entry.get("dtype") in dtypes and isinstance(entry.get("crc32"), str)
            expect(good, f"{part}.{name!r:.200}", f"a dtype of {', '.join(dtypes)}, a shape and a crc32")
    for part, kind in (("source", dict), ("tied_lm_head", dict), ("expert_layout", str)):
        expect(record.get(part) is None or isinstance(record[part], kind), part, "an object, a string or null")
    return record
