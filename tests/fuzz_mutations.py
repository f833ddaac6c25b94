"""Random damage to model directories. Each mutation takes a generator and a directory, and says whether it must be refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hf_checkpoints import read_raw, write_raw

Mutation = Callable[[random.Random, Path], bool | None]
"""Returns True if the result must be refused: it leads out of its directory, or is no file that may be opened."""

INDEX, SIDE_FILE = "model.safetensors.index.json", "tokenizer.json"
HUGE = 1 << 40
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "\n", "\ud800", "\udcff", "\x1b[2J", "a" * 5000, "..", "../secret", "/etc/passwd", "F32", "F4",
    "float8_e4m3fn", [], [0], [1, 2], [2**62, 2**62], [[]], [None], ["\ud800"], {}, {"": {}}, {"a": 1}, list(range(3000)),
)  # fmt: skip


TOKENS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000", b"9" * 5000, b"[" * 200_000, b"\xff", b"1e999")


# --- JSON --------------------------------------------------------------------------------------------------------------


def _nodes(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in items for place in _nodes(child, (*path, key)))]


def _change_node(rng: random.Random, value: Any) -> Any:
    """Replaces, removes, renames or copies one place of a JSON value."""
    # places near the root are few and matter most
    places = sorted(_nodes(value), key=len)[1:] or [()]
    path = places[min(int(rng.paretovariate(0.4)), len(places)) - 1] if rng.random() < 0.4 else rng.choice(places)
    if not path:
        return rng.choice(ODD)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice([key for key in ODD if isinstance(key, str)])] = parent.pop(path[-1])
    elif kind == 2:
        other = value
        for key in rng.choice(places):
            other = other[key]
        parent[path[-1]] = json.loads(json.dumps(other))
    elif kind == 3 and isinstance(parent[path[-1]], int):
        parent[path[-1]] = rng.choice([-1, 1, 2, 10, 1 << 20, 1 << 40]) * parent[path[-1]] + rng.choice([0, 1, -1])
    else:
        parent[path[-1]] = rng.choice(ODD)
    return value


def _change_text(rng: random.Random, text: bytes) -> bytes:
    """Flips, removes, repeats or inserts bytes."""
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 2, 20, 200])
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at:at] = rng.choice(TOKENS)
        elif at < len(data):
            data[at] = rng.randrange(256)
    return bytes(data)


def _twice(rng: random.Random, text: bytes) -> bytes:
    """One member of an object a second time."""
    members = [at for at, byte in enumerate(text) if byte == ord(",") and text[at + 1 :].lstrip()[:1] == b'"']
    at = rng.choice(members) if members else 0
    key = text[at + 1 :].lstrip().split(b":")[0]
    return text[:at] + b"," + key + b":" + rng.choice([b"1", b"{}", b'"x"', b"null"]) + text[at:]


def _content(file: Path) -> bytes:
    """Raises ValueError if an earlier mutation left nothing that can be read."""
    if not file.is_file() or file.stat().st_size > 1 << 24:
        raise ValueError(f"{file}: spoilt already")
    return file.read_bytes()


def json_file(find: Callable[[random.Random, Path], Path]) -> Mutation:
    """Damage to a file that holds JSON."""

    def mutate(rng: random.Random, directory: Path) -> None:
        file = find(rng, directory)
        text = _content(file)
        kind = rng.randrange(8)
        if kind < 5:
            file.write_text(json.dumps(_change_node(rng, json.loads(text))))
        elif kind == 5:
            file.write_bytes(_twice(rng, text))
        elif kind == 6:
            file.write_bytes(_change_text(rng, text))
        else:
            damage_file(rng, file)

    return mutate


# --- files -------------------------------------------------------------------------------------------------------------


def damage_file(rng: random.Random, file: Path) -> None:
    """Cuts, extends, empties or overwrites a file."""
    data = _content(file)
    kind = rng.randrange(7)
    if kind == 0:
        os.truncate(file, rng.randrange(len(data) + 1))
    elif kind == 1:
        file.write_bytes(data + rng.randbytes(rng.choice([1, 8, 1000])))
    elif kind == 2:
        os.truncate(file, HUGE)  # sparse
    elif kind == 3:
        file.write_bytes(rng.choice([b"", b"\0", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x04cos\nsystem\n."]))
    elif kind == 4:
        file.write_bytes(rng.randbytes(len(data)))
    else:
        file.write_bytes(_change_text(rng, data))


def replace_file(rng: random.Random, file: Path) -> bool:
    """Another kind of thing under the file's name, or nothing."""
    outside = next(place for place in file.parents if place.name == "model").parent / "outside"
    file.rename(outside)  # perfectly good, but elsewhere
    kind = rng.choice(["link out", "device", "loop", "link to nothing", "pipe", "folder", "nothing"])
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "nothing":
        file.symlink_to({"link out": outside, "device": "/dev/zero", "loop": file.name, "link to nothing": "gone"}[kind])
    return file.name != SIDE_FILE or kind not in ("folder", "nothing")  # a side file may be missing


def replaced(find: Callable[[random.Random, Path], Path]) -> Mutation:
    return lambda rng, directory: replace_file(rng, find(rng, directory))


def named(name: str) -> Callable[[random.Random, Path], Path]:
    return lambda rng, directory: directory / name


def any_of(pattern: str) -> Callable[[random.Random, Path], Path]:
    def find(rng: random.Random, directory: Path) -> Path:
        found = sorted(path for path in directory.glob(pattern) if path.is_file() and path.stat().st_size <= 1 << 24)
        if not found:
            raise ValueError(f"{directory}: no {pattern} left")
        return rng.choice(found)

    return find


def damaged(find: Callable[[random.Random, Path], Path]) -> Mutation:
    return lambda rng, directory: damage_file(rng, find(rng, directory))


# --- Hugging Face directories ------------------------------------------------------------------------------------------

shard = any_of("*.safetensors")


def header(rng: random.Random, directory: Path) -> None:
    """A header that says something else of the same data."""
    file = shard(rng, directory)
    found, data = read_raw(file)
    kind = rng.randrange(4)
    if kind == 0:
        write_raw(file, found, data, length=rng.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(100_000)]))
    elif kind == 1:
        write_raw(file, _twice(rng, json.dumps(found).encode()), data)
    elif kind == 2:
        write_raw(file, _change_text(rng, json.dumps(found).encode()), data)
    else:
        changed = _change_node(rng, found)
        write_raw(file, json.dumps(changed).encode(), data)


def tensor_entry(rng: random.Random, directory: Path) -> None:
    """One field of one tensor's entry."""
    file = shard(rng, directory)
    found, data = read_raw(file)
    key = rng.choice(sorted(found.keys() - {"__metadata__"}))
    field = rng.choice(["dtype", "shape", "data_offsets"])
    dtypes = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "F4", "C64"]
    value = found[key][field]
    if field == "dtype" and rng.random() < 0.7:
        found[key][field] = rng.choice(dtypes)
    elif isinstance(value, list) and value and rng.random() < 0.7:
        value[rng.randrange(len(value))] = rng.choice([0, -1, 2**31, 2**62, 2**64, 1.5, "1", None, value[-1] * 2, value[0]])
        rng.shuffle(value)
    else:
        found[key][field] = rng.choice(ODD)
    write_raw(file, found, data)


def swapped(rng: random.Random, directory: Path) -> None:
    """Two tensors under each other's names, or one under a name of no tensor."""
    file = shard(rng, directory)
    found, data = read_raw(file)
    a, b = rng.sample(sorted(found.keys() - {"__metadata__"}), 2)
    if rng.random() < 0.5:
        found[a], found[b] = found[b], found[a]
    else:
        found[rng.choice(["", "model.", a + ".weight", a[:-1], "\ud800", f"{a}_scale_inv", "blocks.0.x"])] = found.pop(a)
    write_raw(file, found, data)


def escaping_index(rng: random.Random, directory: Path) -> bool:
    """The index names a file that is not in the directory."""
    index = json.loads(_content(directory / INDEX))
    key = rng.choice(sorted(index["weight_map"]))
    outside = directory.parent / "outside.safetensors"
    outside.write_bytes((directory / index["weight_map"][key]).read_bytes())
    names = ["../outside.safetensors", str(outside), "sub/../../outside.safetensors", "/dev/zero", "..", ".", "", "\0", "\ud800",
             "a" * 5000, "config.json", "..\\outside.safetensors", f"./../{outside.name}", "~/x", "file:///etc"]  # fmt: skip
    index["weight_map"][key] = rng.choice(names)
    (directory / INDEX).write_text(json.dumps(index))
    return True


def huge_counts(rng: random.Random, directory: Path) -> None:
    """A config of a model that no machine holds."""
    config = json.loads(_content(directory / "config.json"))
    section = config[rng.choice(["text_config", "vision_config"])]
    key = rng.choice([key for key, value in section.items() if type(value) in (int, float, list)])
    value = rng.choice([2**20, 2**31, 2**40, 2**62, 10**30, 10**400])
    section[key] = [value] * 3 if isinstance(section[key], list) else value
    (directory / "config.json").write_text(json.dumps(config))


def quantised(rng: random.Random, directory: Path) -> None:
    """A quantization_config that does not go with the tensors."""
    config = json.loads(_content(directory / "config.json"))
    section: Any = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    config["quantization_config"] = _change_node(rng, section)
    (directory / "config.json").write_text(json.dumps(config))


HF: dict[str, Mutation] = {
    "header": header,
    "tensor entry": tensor_entry,
    "swapped": swapped,
    "config": json_file(named("config.json")),
    "huge counts": huge_counts,
    "quantised": quantised,
    "weights damaged": damaged(shard),
    "weights replaced": replaced(shard),
    "config replaced": replaced(named("config.json")),
    "side file replaced": replaced(named(SIDE_FILE)),
}
SHARDED: dict[str, Mutation] = {
    "index": json_file(named(INDEX)),
    "escaping index": escaping_index,
    "index replaced": replaced(named(INDEX)),
}

# --- converted directories ---------------------------------------------------------------------------------------------

zarr = any_of("checkpoint/state/*/zarr.json")
chunk = any_of("checkpoint/state/*/c/**/*")
metadata = named("checkpoint/state/_METADATA")


def linked_folder(rng: random.Random, directory: Path) -> bool:
    """A folder of the checkpoint is a link out of the directory."""
    folder = rng.choice([directory / "checkpoint", directory / "checkpoint" / "state", zarr(rng, directory).parent])
    outside = directory.parent / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    return True


CONVERTED: dict[str, Mutation] = {
    "record": json_file(named("conversion.json")),
    "config": json_file(named("config.json")),
    "huge counts": huge_counts,
    "metadata": json_file(metadata),
    "array metadata": json_file(zarr),
    "chunk": damaged(chunk),
    "record replaced": replaced(named("conversion.json")),
    "metadata replaced": replaced(metadata),
    "array metadata replaced": replaced(zarr),
    "chunk replaced": replaced(chunk),
    "linked folder": linked_folder,
}
