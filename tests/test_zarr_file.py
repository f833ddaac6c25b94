"""Our files of sharded arrays, read back by TensorStore: any shape, any cut, ragged ends, transposed sources."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.chunks import Chunks, pieces
from convert.orbax_stream import Leaf, LeafWriter, Piece
from convert.zarr_file import write_zarr_file
from qvlmoe_jax.orbax_store import store_spec
from qvlmoe_jax.zarr_files import ZarrFiles, crc32c

DTYPES = [np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32)]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Chunks]:
    shape, file, chunk = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        step, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        chunk.append(step)
        file.append(step * count)
        shape.append(draw(st.integers(step, 2 * step * count)))
    return tuple(shape), Chunks(tuple(file), tuple(chunk))


def write(directory: Path, array: np.ndarray, chunks: Chunks) -> Leaf:
    leaf = Leaf("a/b", array.shape, array.dtype, chunks)
    (directory / "state").mkdir()
    found = [Piece(leaf, cell, index) for cell, index in pieces(array.shape, chunks)]
    assert list(LeafWriter(directory).write((piece, array[piece.index]) for piece in found)) == found
    return leaf


@settings(max_examples=60)
@given(cut=cuts(), dtype=st.sampled_from(DTYPES), turned=st.booleans(), seed=st.integers(0, 9))
def test_tensorstore_reads_what_was_written(
    cut: tuple[tuple[int, ...], Chunks], dtype: np.dtype, turned: bool, seed: int
) -> None:
    shape, chunks = cut
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, shape[::-1] if turned else shape).astype(np.uint16)
    array = (bits.T if turned else bits).astype(f"u{dtype.itemsize}").view(dtype)
    if turned:
        array = np.asfortranarray(array)
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), array, chunks)
        spec = store_spec(Path(directory) / "state", "a.b") | {"fill_missing_data_reads": False}
        found = ts.open(spec, open=True).result().read().result()
        ours = ZarrFiles.open(Path(directory) / "state" / "a.b")
        assert ours is not None and (ours.shape, ours.dtype) == (array.shape, dtype)
        for _ in range(5):
            index = tuple(
                slice(*sorted(rng.integers(0, size + 1, 2).tolist())) if rng.random() < 0.8 else int(rng.integers(size))
                for size in shape
            )
            for copy in (True, False):
                part = ours.read(index, copy=copy)
                assert part.shape == array[index].shape
                assert part.tobytes() == array[index].tobytes()
        del ours
    assert found.dtype == dtype
    assert found.tobytes() == np.ascontiguousarray(array).tobytes()


def test_a_changed_index_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, np.arange(24, dtype=np.float32).reshape(4, 6), Chunks((4, 6), (2, 3)))
    file = tmp_path / "state" / "a.b" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="Digest mismatch"):
        ts.open(store_spec(tmp_path / "state", "a.b"), open=True).result().read().result()
    ours = ZarrFiles.open(tmp_path / "state" / "a.b")
    assert ours is not None
    with pytest.raises(ValueError, match="another checksum"):
        ours.read(None)


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "taken" / "0"
    (tmp_path / "taken" / "0").mkdir(parents=True)
    with pytest.raises(OSError):
        write_zarr_file(path, np.zeros((2, 2), np.float32), (2, 2), (2, 2))
    assert [entry.name for entry in path.parent.iterdir()] == ["0"]
