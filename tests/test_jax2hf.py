"""Back to the hub: bit for bit, name for name, and what `verify` and `inspect` say about it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from orbax.checkpoint import v1 as ocp

from convert.__main__ import main
from convert.chunks import pieces, plan_chunks
from qvlmoe_jax.checkpoint import load_params, open_weights
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.hf import expand, param_shapes
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.sharding import table_row
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.hub_configs import HUB_30B, HUB_235B

BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, np.ndarray]
Captured = pytest.CaptureFixture[str]
SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0",   "added_tokens": []}',
    "preprocessor_config.json": '{"size": {"shortest_edge": 65536}}\n',
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "a b\n",
    "README.md": "# Ünïcode\r\n",
}


def random_bits(config: tiny.ConfigDict, dtype: np.dtype = BF16) -> Arrays:
    rng = np.random.default_rng(0)
    rows = expand(Qwen3VLMoeConfig.from_hf(config))
    bits = {row.key: rng.integers(0, 1 << 32, row.hf_shape, dtype=np.uint32) for row in rows}
    return {key: array.astype(f"u{dtype.itemsize}").view(dtype) for key, array in bits.items()}


def write_source(directory: Path, config: tiny.ConfigDict, tensors: Arrays, shards: int = 2) -> Path:
    write_hf_checkpoint(directory, config, tensors, shards)
    for name, text in SIDE_FILES.items():
        (directory / name).write_bytes(text.encode())
    return directory


def read_all(directory: Path) -> Arrays:
    tensors: Arrays = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(safetensors.numpy.load_file(file))
    return tensors


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].tobytes() == tensor.tobytes(), key


def assert_same_side_files(back: Path, source: Path) -> None:
    for name in ["config.json", *SIDE_FILES]:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "duplicate_head"),
    [
        *((name, False) for name in ("tiny", "mixed", "irregular", "dense", "dense_tied", "tied", "square_i", "square_2i")),
        ("tied", True),
        ("dense_tied", True),
    ],
)
def test_hub_to_orbax_to_hub_is_bit_for_bit(name: str, duplicate_head: bool, tmp_path: Path, capsys: Captured) -> None:
    config = tiny.ALL[name]
    tensors = random_bits(config)
    if duplicate_head:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].copy()
    source = write_source(tmp_path / "hf", config, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back"), "--max-shard-size", "300kB"]) == 0
    assert_same(read_all(tmp_path / "back"), tensors)
    assert_same_side_files(tmp_path / "back", source)
    for a, b in (("hf", "jax"), ("jax", "back"), ("hf", "back"), ("back", "jax")):
        assert main(["verify", str(tmp_path / a), str(tmp_path / b)]) == 0
        assert "bit for bit" in capsys.readouterr().out.splitlines()[-1]


def test_the_index_is_as_the_hub_writes_it(tmp_path: Path) -> None:
    tensors = random_bits(tiny.TINY)
    source = write_source(tmp_path / "hf", tiny.TINY, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back"), "--max-shard-size", "0.5MB"]) == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for key, file in index["weight_map"].items():
        assert key in safetensors.numpy.load_file(tmp_path / "back" / file)
    assert index["weight_map"].keys() == tensors.keys()
    assert all((tmp_path / "back" / file).stat().st_size < 520_000 for file in files)


def test_the_5x_layout_goes_back_in_the_hubs(tmp_path: Path, capsys: Captured) -> None:
    tensors = random_bits(tiny.TINY)
    turned = {key: t.swapaxes(1, 2).copy() if ".experts." in key else t for key, t in tensors.items()}
    source = write_source(tmp_path / "hf", tiny.TINY, turned)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    assert_same(read_all(tmp_path / "back"), tensors)
    assert main(["verify", str(source), str(tmp_path / "back")]) == 0


def test_tensors_of_several_dtypes_get_their_own_back(tmp_path: Path) -> None:
    tensors = random_hf_tensors(tiny.UNIFORM, dtype=BF16)
    tensors["model.language_model.layers.1.input_layernorm.weight"] = np.ones(64, np.float16)
    tensors["model.language_model.layers.2.mlp.gate.weight"] = random_hf_tensors(tiny.UNIFORM)[
        "model.language_model.layers.2.mlp.gate.weight"
    ]
    source = write_source(tmp_path / "hf", tiny.UNIFORM, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    assert_same(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize(("have", "cast"), [(BF16, "float32"), (np.dtype(np.float32), "bfloat16")])
def test_a_cast_is_verified_and_written_into_the_config(have: np.dtype, cast: str, tmp_path: Path, capsys: Captured) -> None:
    tensors = random_hf_tensors(tiny.TINY, dtype=have)
    config = tiny.variant(tiny.TINY, text_config={"dtype": have.name}) | {"dtype": have.name}
    source = write_source(tmp_path / "hf", config, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dtype", cast]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    assert_same(read_all(tmp_path / "back"), {key: tensor.astype(cast) for key, tensor in tensors.items()})
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["dtype"], written["text_config"]["dtype"]) == (cast, cast)
    capsys.readouterr()
    assert main(["verify", str(source), str(tmp_path / "jax")]) == 0
    assert f"after the cast {have.name} -> {cast}" in capsys.readouterr().out


def training_run(directory: Path, config: tiny.ConfigDict, params: Any, step: int) -> Path:
    """What a training run leaves: float32 master weights inside a train state, saved by Orbax as it does by itself."""
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    state = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), params), "step": jnp.asarray(step)}
    ocp.save(str((directory / "checkpoints" / str(step)).resolve()), state)
    return directory


def test_a_training_run_goes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = random_hf_tensors(tiny.MIXED, dtype=BF16)
    config = tiny.MIXED | {"dtype": "bfloat16"}
    source = write_source(tmp_path / "hf", config, tensors)
    params = load_params(open_weights(source))
    run = tmp_path / "run"
    write_side = [*SIDE_FILES, "config.json"]
    (run / "hf").mkdir(parents=True)
    for name in write_side:
        (run / "hf" / name).write_bytes((source / name).read_bytes())
    training_run(run, config, jax.tree.map(jnp.zeros_like, params), 9)
    training_run(run, config, params, 10)
    for place, name in ((run, "newest"), (run / "checkpoints" / "10", "step")):
        assert main(["jax2hf", str(place), str(tmp_path / name)]) == 0
        assert_same(read_all(tmp_path / name), tensors)
        assert_same_side_files(tmp_path / name, source)
    assert main(["jax2hf", str(run / "checkpoints" / "9"), str(tmp_path / "older")]) == 0
    assert not any(tensor.astype(np.float32).any() for tensor in read_all(tmp_path / "older").values())


def test_verify_names_what_differs(tmp_path: Path, capsys: Captured) -> None:
    tensors = random_hf_tensors(tiny.TINY, dtype=BF16)
    source = write_source(tmp_path / "hf", tiny.TINY, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    key = "model.language_model.layers.3.mlp.experts.down_proj"
    changed = tensors | {key: tensors[key].copy()}
    changed[key][2, 1, 7] += 1
    other = write_source(tmp_path / "other", tiny.TINY, changed)
    capsys.readouterr()
    for a, b in ((other, tmp_path / "jax"), (tmp_path / "jax", other), (source, other)):
        assert main(["verify", str(a), str(b)]) == 2
        err = capsys.readouterr().err
        assert f"'{key}' in 1 of 12288 numbers, first at [2, 1, 7]" in err
        assert len(err.splitlines()) == 1
    assert main(["verify", str(other), str(tmp_path / "jax")]) == 2
    assert "has checksum" in capsys.readouterr().err
    (tmp_path / "jax" / "merges.txt").write_text("b a\n")
    assert main(["verify", str(source), str(tmp_path / "jax")]) == 2
    assert "merges.txt has other contents" in capsys.readouterr().err


def test_export_refuses_what_is_no_converted_directory(tmp_path: Path, capsys: Captured) -> None:
    source = write_source(tmp_path / "hf", tiny.TINY, random_hf_tensors(tiny.TINY))
    assert main(["jax2hf", str(source), str(tmp_path / "back")]) == 2
    assert "a Hugging Face checkpoint already" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_transformers_loads_the_export_to_equal_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = pytest.importorskip("tests.reference")
    config = tiny.TINY
    tensors = random_hf_tensors(config)
    source = write_source(tmp_path / "hf", config, tensors)
    assert main(["hf2jax", str(source), str(tmp_path / "jax")]) == 0
    assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype="float32", attn_implementation="sdpa", experts_implementation="eager"
    )
    case = {"input_ids": np.arange(1, 41)[None] % 250, "attention_mask": np.ones((1, 40), np.int64)}
    expected = reference.logits(reference.build_model(config, tensors), case)
    np.testing.assert_array_equal(reference.logits(loaded.eval().requires_grad_(False), case), expected)


# --- the 30B, without its 62 GB ----------------------------------------------------------------------------------------


def sparse_checkpoint(directory: Path, config: tiny.ConfigDict) -> Path:
    """True headers over files that are holes: 62 GB to look at, none on the disk."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    rows = expand(Qwen3VLMoeConfig.from_hf(config))
    groups: list[dict[str, Any]] = [{}]
    size = 0
    for row in rows:
        nbytes = 2 * int(np.prod(row.hf_shape))
        if groups[-1] and size + nbytes > 5 * 10**9:
            groups.append({})
            size = 0
        groups[-1][row.key] = {"dtype": "BF16", "shape": row.hf_shape, "data_offsets": [size, size + nbytes]}
        size += nbytes
    weight_map = {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        header = json.dumps(group).encode()
        with (directory / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in group.values()))
        weight_map.update(dict.fromkeys(group, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_the_30b_is_inspected_in_no_time_and_planned(tmp_path: Path) -> None:
    source = sparse_checkpoint(tmp_path / "30b", HUB_30B)
    root = Path(__file__).parents[1]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convert", "inspect", str(source)], cwd=root, capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert seconds < 2
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "orbax", "torch", "transformers", "tensorstore"}
    for expected in ("31,070,754,032", "62,141,508,064", "hub expert layout", "882", "8 of 128 experts"):
        assert expected in done.stdout, expected
    done = subprocess.run(
        [sys.executable, "-m", "convert", "hf2jax", str(source), str(tmp_path / "jax"), "--dry-run"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "882 tensors" in done.stdout
    assert "62,141,508,064 bytes to write" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["30b"]
    assert len(HFWeights(source).files.files) == 13


@pytest.mark.parametrize("config", [HUB_30B, HUB_235B, tiny.TINY, tiny.MIXED], ids=["30b", "235b", "tiny", "mixed"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_files_cover_every_number_once_and_fit_memory(config: tiny.ConfigDict, itemsize: int) -> None:
    for path, shape in param_shapes(Qwen3VLMoeConfig.from_hf(config)).items():
        chunks = plan_chunks(shape, table_row(path), itemsize)
        assert all(file % chunk == 0 for file, chunk in zip(chunks.file, chunks.chunk, strict=True)), path
        assert np.prod(chunks.file) * itemsize <= 80 << 20, path  # 4748 rows of the 235B's float32 embedding cannot be halved
        count = 0
        for _, index in pieces(shape, chunks):
            assert all(0 <= part.start < part.stop <= size for part, size in zip(index, shape, strict=True))
            count += int(np.prod([part.stop - part.start for part in index]))
        assert count == int(np.prod(shape))


@pytest.mark.parametrize("room", [0, 1 << 8, 1 << 14], ids=["no side file", "no config.json", "no weights"])
def test_a_disk_that_takes_no_more_is_one_line_with_the_file(room: int, tmp_path: Path, capsys: Captured) -> None:
    source = write_source(tmp_path / "hf", tiny.TINY, random_bits(tiny.TINY))
    assert main(["hf2jax", str(source), str(tmp_path / "jax"), "--dtype", "float32"]) == 0
    capsys.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))  # Python ignores the signal: the write fails
    try:
        assert main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "back.exporting") + "/" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "jax"]
