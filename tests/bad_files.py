"""Ways to spoil the files of a good checkpoint, each with what the one line about it must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.hf_checkpoints import read_raw, write_raw

SHARD = "model-00002-of-00003.safetensors"
OTHER_SHARD = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.language_model.norm.weight"

Damage = Callable[[Path], None]
CASES: list[Any] = []


def case(name: str, *expected: str) -> Callable[[Damage], Damage]:
    """Registers a way to spoil the three-shard TINY checkpoint in the directory it is given, and what the line must say."""

    def register(damage: Damage) -> Damage:
        CASES.append(pytest.param(damage, expected, id=name))
        return damage

    return register


# --- files -------------------------------------------------------------------------------------------------------------


@case("empty directory", "hf", "empty directory", "expected model.safetensors or")
def _(source: Path) -> None:
    shutil.rmtree(source)
    source.mkdir()


@case("no directory", "hf: not a directory", "expected a Hugging Face checkpoint")
def _(source: Path) -> None:
    shutil.rmtree(source)


@case("a file", "hf: not a directory", "expected a Hugging Face checkpoint")
def _(source: Path) -> None:
    shutil.rmtree(source)
    source.write_text("weights")


@case("pickle only", "pytorch_model.bin", "never read", "expected model.safetensors or")
def _(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")


@case("shards without an index", OTHER_SHARD, "expected model.safetensors or")
def _(source: Path) -> None:
    (source / INDEX).unlink()


@case("config only", "no weights", "expected model.safetensors or")
def _(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()


@case("an adapter", "an adapter alone", "merge it into its base")
def _(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    (source / "adapter_config.json").write_text("{}")


@case("single file beside an index of other shards", "both model.safetensors and", "expected one")
def _(source: Path) -> None:
    shutil.copy(source / SHARD, source / "model.safetensors")


@case("missing shard", SHARD, "not found", "expected a regular file")
def _(source: Path) -> None:
    (source / SHARD).unlink()


@case("a directory for a shard", SHARD, "expected a regular file")
def _(source: Path) -> None:
    (source / SHARD).unlink()
    (source / SHARD).mkdir()


@case("a link that leads nowhere", SHARD, "expected a regular file")
def _(source: Path) -> None:
    (source / SHARD).unlink()
    (source / SHARD).symlink_to("gone")


@case("a loop of links", SHARD, "expected")
def _(source: Path) -> None:
    (source / SHARD).unlink()
    (source / SHARD).symlink_to(SHARD)


@case("truncated shard", SHARD, "bytes of data, expected", "truncated")
def _(source: Path) -> None:
    raw = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(raw[:-100])


@case("shard cut inside its header", SHARD, "header of", "expected at most 92")
def _(source: Path) -> None:
    (source / SHARD).write_bytes((source / SHARD).read_bytes()[:100])


@case("shard of five bytes", SHARD, "expected at most 0")
def _(source: Path) -> None:
    (source / SHARD).write_bytes(b"12345")


@case("bytes after the data", SHARD, "bytes of data, expected")
def _(source: Path) -> None:
    (source / SHARD).write_bytes((source / SHARD).read_bytes() + b"more")


@case("git-lfs pointer", SHARD, "git-lfs pointer", "git lfs pull")
def _(source: Path) -> None:
    (source / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")


# --- headers -----------------------------------------------------------------------------------------------------------


def lying_length(name: str, length: int) -> None:
    @case(name, SHARD, f"header of {length} bytes", "expected at most")
    def _(source: Path) -> None:
        header, data = read_raw(source / SHARD)
        write_raw(source / SHARD, header, data, length)


lying_length("header longer than the file", 10**12)
lying_length("header of negative length", 2**64 - 1)


def lying_header(name: str, edit: Callable[[dict[str, Any], str, str], None], *expected: str) -> None:
    """`edit` gets the header and the keys of the first two tensors of the file, in the order of their data."""

    @case(name, SHARD, *expected)
    def _(source: Path) -> None:
        header, data = read_raw(source / SHARD)
        keys = sorted(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
        edit(header, *keys[:2])
        write_raw(source / SHARD, header, data)


def field(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any], str, str], None]:
    """Replaces one field of the second tensor."""

    def edit(header: dict[str, Any], first: str, second: str) -> None:
        header[second][name] = value(header[second][name])

    return edit


def shift(amount: int) -> Callable[[Any], Any]:
    return lambda offsets: [offset + amount for offset in offsets]


lying_header("offsets that overlap", field("data_offsets", shift(-4)), "overlaps", "expected offset")
lying_header("offsets with a hole", field("data_offsets", shift(4)), "leaves a hole", "expected offset")
lying_header("offsets past the end", field("data_offsets", shift(10**15)), "leaves a hole", "expected offset")
lying_header("negative offset", field("data_offsets", lambda o: [-4, o[1] - o[0] - 4]), "data_offsets [-4", "expected [begin")
lying_header("offsets reversed", field("data_offsets", lambda o: o[::-1]), "data_offsets", "expected [begin, end]")
lying_header("one offset", field("data_offsets", lambda o: o[:1]), "data_offsets", "expected [begin, end]")
lying_header("offsets not numbers", field("data_offsets", lambda o: [True, "9"]), "data_offsets", "expected [begin, end]")
lying_header("wrong size", field("data_offsets", lambda o: [o[0], o[1] - 4]), "spans", "bytes, expected")
lying_header("huge shape", field("shape", lambda s: [2**62, 2**62]), "bytes, expected")
lying_header("negative shape", field("shape", lambda s: [-n for n in s]), "shape [-", "expected a list of sizes")
lying_header("shape not a list", field("shape", str), "has shape '", "expected a list of sizes")
lying_header("unknown dtype", field("dtype", lambda d: "F42"), "dtype 'F42'", "expected one of F64")
lying_header("dtype not a string", field("dtype", lambda d: ["F32"]), "dtype ['F32']", "expected one of F64")
lying_header("entry without a dtype", lambda h, a, b: h[b].pop("dtype"), "expected an object with dtype, shape and data_offsets")
lying_header("entry not an object", lambda h, a, b: h.update({b: None}), "expected an object with dtype, shape and data_offsets")
lying_header("tensor left out of the header", lambda h, a, b: h.pop(b), "leaves a hole after")
lying_header("metadata not strings", lambda h, a, b: h.update(__metadata__={"format": 1}), "expected an object of strings")


def raw_header(name: str, header: Callable[[bytes], bytes], *expected: str) -> None:
    @case(name, SHARD, *expected)
    def _(source: Path) -> None:
        good, data = read_raw(source / SHARD)
        write_raw(source / SHARD, header(json.dumps(good).encode()), data)


raw_header("header not JSON", lambda h: h[:-2], "header: not valid JSON")
raw_header("header not UTF-8", lambda h: b'{"\xff": 1}', "header: not valid JSON")
raw_header("header nested too deep", lambda h: b"[" * 200_000, "header: not valid JSON")
raw_header("header with an endless number", lambda h: b'{"a": ' + b"9" * 5000 + b"}", "header: not valid JSON")
raw_header("header a list", lambda h: b"[]", "header is list, expected an object")
raw_header("key twice in a header", lambda h: b'{"a": 1, "a": 1}', "key 'a' appears twice", "expected every key once")


# --- the index ---------------------------------------------------------------------------------------------------------


def edit_index(source: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((source / INDEX).read_text())
    edit(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def outside(name: str, where: str) -> None:
    @case(name, where, "points outside the directory", "expected a name inside it")
    def _(source: Path) -> None:
        safetensors.numpy.save_file({NORM: np.ones(64, np.float32)}, source.parent / "secret.safetensors")
        edit_index(source, lambda weight_map: weight_map.update({NORM: where}))


outside("index points up", "../secret.safetensors")
outside("index points up from inside", "sub/../../secret.safetensors")
outside("index points to an absolute path", "/etc/secret.safetensors")
outside("index names nothing", "")


@case("a shard is a link out of the directory", SHARD, "outside the directory", "expected a file inside it")
def _(source: Path) -> None:
    shutil.move(source / SHARD, source.parent / "elsewhere.safetensors")
    (source / SHARD).symlink_to(source.parent / "elsewhere.safetensors")


@case("a shard in a folder that is a link out of the directory", "outside the directory", "expected a file inside it")
def _(source: Path) -> None:
    shutil.move(source / SHARD, source.parent / SHARD)
    (source / "sub").symlink_to(source.parent)
    edit_index(source, lambda m: m.update({key: f"sub/{SHARD}" for key, name in m.items() if name == SHARD}))


@case("index not JSON", INDEX, "not valid JSON")
def _(source: Path) -> None:
    (source / INDEX).write_text('{"weight_map": {')


@case("index without a weight_map", INDEX, "expected an object of tensor name -> file name")
def _(source: Path) -> None:
    (source / INDEX).write_text("[]")


@case("index with a number for a file", INDEX, "expected an object of tensor name -> file name")
def _(source: Path) -> None:
    edit_index(source, lambda weight_map: weight_map.update({NORM: 2}))


@case("key twice in the index", INDEX, f"key '{NORM}' appears twice", "expected every key once")
def _(source: Path) -> None:
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{SHARD}", '))


@case("key in two shards", "is also in", "expected it in one shard")
def _(source: Path) -> None:
    shard = safetensors.numpy.load_file(source / SHARD) | safetensors.numpy.load_file(source / OTHER_SHARD)
    safetensors.numpy.save_file(shard, source / SHARD)


@case("key in the index but not in its shard", "tensor 'ghost'", f"not in {SHARD}, expected it there")
def _(source: Path) -> None:
    edit_index(source, lambda weight_map: weight_map.update(ghost=SHARD))


@case("key in another shard than the index says", INDEX, NORM, "is said to be in")
def _(source: Path) -> None:
    edit_index(source, lambda m: m.update({NORM: OTHER_SHARD if m[NORM] != OTHER_SHARD else SHARD}))


@case("key in a shard but not in the index", NORM, f"not in {INDEX}", "expected every tensor to be listed")
def _(source: Path) -> None:
    edit_index(source, lambda weight_map: weight_map.pop(NORM))
