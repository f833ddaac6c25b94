"""Reading and writing safetensors by ourselves gives what the safetensors package gives, from any file it could be given."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.file_copy import MappedFile
from qvlmoe_jax.hf import Row
from qvlmoe_jax.safetensors_io import DTYPE_NAMES, DTYPES, map_tensor, read_header, write_safetensors
from qvlmoe_jax.shards import INDEX_FILE, SafetensorsCheckpoint, write_shards
from tests.hf_checkpoints import write_raw


def random_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Every bit pattern of the dtype, NaNs with their payloads too."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == np.bool_ else 256, count).astype(np.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def one_of_each() -> dict[str, np.ndarray]:
    tensors = {name: random_bits((3, 5), dtype, seed) for seed, (name, dtype) in enumerate(DTYPES.items())}
    return tensors | {"scalar": random_bits((), np.dtype(np.float32)), "empty": np.zeros((2, 0, 3), np.float32)}


def read_all(path: Path) -> dict[str, np.ndarray]:
    mapped = MappedFile.open(path)
    return {key: map_tensor(mapped, info) for key, info in read_header(path).items()}


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    tensors = one_of_each()
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_all(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in tensors.items())


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = one_of_each() | {"transposed": random_bits((4, 6), np.dtype(ml_dtypes.bfloat16)).T}
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}, lambda key: [tensors[key]])
    views = dict(safetensors.deserialize(path.read_bytes()))
    found = {key: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for key, view in views.items()}
    assert found == {key: (DTYPE_NAMES[tensor.dtype], tensor.shape, tensor.tobytes()) for key, tensor in tensors.items()}
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    for info in read_header(path).values():
        assert info.start % info.dtype.itemsize == 0


def test_reads_data_at_any_alignment(tmp_path: Path) -> None:
    """The format pads nothing: a header of odd length puts every number at an odd address."""
    values = random_bits((6, 5), np.dtype(ml_dtypes.bfloat16))
    entry = {"dtype": "BF16", "shape": [6, 5], "data_offsets": [0, 60]}
    for padding in (b"", b" ", b"  ", b"   "):
        write_raw(tmp_path / "a.safetensors", json.dumps({"x": entry}).encode() + padding, values.tobytes())
        found = read_all(tmp_path / "a.safetensors")["x"]
        assert same_bits(np.ascontiguousarray(found.T), np.ascontiguousarray(values.T))
        out = np.empty(values.T.shape, np.float32)
        out[...] = found.T
        np.testing.assert_array_equal(out, values.T.astype(np.float32))


def test_arrays_and_their_rearrangements_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.arange(24, dtype=np.float32).reshape(6, 4)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    array = checkpoint.array("x")
    assert not array.flags.owndata and not array.flags.writeable
    row = Row("x", "x", (), (6, 4), (2, 3, 4), (2, 0, 1))
    assert np.shares_memory(row.to_param(array), checkpoint.array("x"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"x": np.ones((3, 2), np.float32), "y": np.ones(5, np.float16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        edit = data.draw(st.sampled_from(("change", "cut", "insert")))
        if edit == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        else:
            raw[at : at + (edit == "change")] = data.draw(st.binary(min_size=1, max_size=3))
        if not raw:
            break
    path.write_bytes(raw)
    try:
        tensors = read_all(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(raw) - 8


def specs_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def test_shards_are_filled_up_to_their_size_and_indexed_as_the_hub_does(tmp_path: Path) -> None:
    sizes = {"a": 30, "b": 30, "c": 50, "d": 120, "e": 10}
    tensors = {key: random_bits((size,), np.dtype(np.uint8), size) for key, size in sizes.items()}
    write_shards(tmp_path, specs_of(tensors), lambda key: [tensors[key]], max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    name = "model-{:05d}-of-00004.safetensors".format
    assert index == {"metadata": {"total_size": 240}, "weight_map": dict(a=name(1), b=name(1), c=name(2), d=name(3), e=name(4))}
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert all(same_bits(checkpoint.array(key), tensor) for key, tensor in tensors.items())


def test_tensors_that_fit_one_file_need_no_index(tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    write_shards(tmp_path, specs_of(tensors), lambda key: [tensors[key]], max_shard_bytes=20)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_dtype_the_format_cannot_name_is_refused(tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.complex64)}
    with pytest.raises(CheckpointError, match="'a' is complex64"):
        write_shards(tmp_path, specs_of(tensors), lambda key: [tensors[key]], max_shard_bytes=100)


def test_a_hub_cache_of_links_into_blobs_is_read(tmp_path: Path) -> None:
    """huggingface_hub's layout: snapshots/REVISION/model.safetensors -> ../../blobs/HASH."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, tmp_path / "blobs" / "beef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/beef")
    np.testing.assert_array_equal(SafetensorsCheckpoint(snapshot).array("x"), np.ones(3, np.float32))
    # the same link is an escape where no hub cache is
    elsewhere = tmp_path / "revisions" / "0123abc"
    elsewhere.mkdir(parents=True)
    (elsewhere / "model.safetensors").symlink_to("../../blobs/beef")
    with pytest.raises(CheckpointError, match="outside the directory"):
        SafetensorsCheckpoint(elsewhere)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "model.safetensors").symlink_to("weights.safetensors")
    assert SafetensorsCheckpoint(tmp_path).tensors.keys() == {"x"}


def test_files_side_by_side_hold_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.random.default_rng(i).normal(size=(40, i + 1)) for i in range(12)}
    for name, at_once in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        write_shards(
            tmp_path / name, specs_of(tensors), lambda key: [tensors[key]], max_shard_bytes=8000, files_at_once=at_once
        )
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(written) > 4 and written == sorted(path.name for path in (tmp_path / "three").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes() for name in written)


def test_one_file_that_fails_stops_the_others(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.zeros(1000) for i in range(4)}
    read: list[str] = []

    def blocks(key: str) -> Iterator[np.ndarray]:
        if key == "t1":
            raise OSError(errno.ENOSPC, "No space left on device")
        for i in range(1000):
            read.append(key)
            time.sleep(0.001)
            yield tensors[key][i : i + 1]

    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path, specs_of(tensors), blocks, max_shard_bytes=8000, files_at_once=2)
    assert 0 < len(read) < 1000  # the file beside it was not finished, the others not begun
