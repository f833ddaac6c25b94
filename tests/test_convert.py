"""`hf2jax`: every number arrives bit for bit, through both Orbax APIs, and the directory is whole or absent."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec
from orbax.checkpoint import v1 as ocp

from convert.__main__ import main
from qvlmoe_jax.checkpoint import load_params, open_weights, save_hf
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import CheckpointError
from qvlmoe_jax.hf import ExpertLayout, expand, param_shapes
from qvlmoe_jax.param_tree import flatten, nest
from qvlmoe_jax.sharding import make_mesh
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, snapshot, write_hf_checkpoint
from tests.tiny import ConfigDict

BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, np.ndarray]


def expected_params(config: ConfigDict, tensors: Arrays, layout: ExpertLayout = "hub") -> Arrays:
    """The parameters by path, from the table's rows (whose meaning test_hf_table establishes)."""
    parsed = Qwen3VLMoeConfig.from_hf(config)
    dtypes = {row.path: tensors[row.key].dtype for row in expand(parsed)}
    params = {path: np.empty(shape, dtypes[path]) for path, shape in param_shapes(parsed).items()}
    for row in expand(parsed, layout):
        params[row.path][row.index] = row.to_param(tensors[row.key])
    return params


def assert_same_bits(found: Any, expected: Arrays) -> None:
    found = flatten(found)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert np.asarray(found[path]).tobytes() == array.tobytes(), path


def abstract(params: Arrays) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return nest({path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for path, array in params.items()})


def random_bits(config: ConfigDict) -> Arrays:
    """bfloat16 tensors of every bit pattern: infinities, NaNs with payloads, negative zero, subnormals."""
    rng = np.random.default_rng(0)
    rows = expand(Qwen3VLMoeConfig.from_hf(config))
    return {row.key: rng.integers(0, 1 << 16, row.hf_shape).astype(np.uint16).view(BF16) for row in rows}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path / "hf", tiny.TINY, random_hf_tensors(tiny.TINY, dtype=BF16), shards=3)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "jax"


@pytest.mark.parametrize(
    ("name", "layout", "shards"),
    [
        ("tiny", "hub", 3),
        ("tiny", "v5", 1),
        ("mixed", "v5", 2),
        ("dense_tied", "hub", 1),
        ("square_i", "v5", 1),
        ("no_deepstack", "hub", 1),
    ],
)
def test_every_bit_arrives_through_both_orbax_apis(
    name: str, layout: ExpertLayout, shards: int, tmp_path: Path, destination: Path
) -> None:
    config = tiny.ALL[name]
    tensors = random_bits(config)
    if layout == "v5":
        tensors = {key: tensor.swapaxes(1, 2) if ".experts." in key else tensor for key, tensor in tensors.items()}
    source = write_hf_checkpoint(tmp_path / "hf", config, tensors, shards)
    assert main(["hf2jax", str(source), str(destination)]) == 0
    expected = expected_params(config, tensors, layout)
    assert_same_bits(ocp.load(str(destination / "checkpoint"), abstract(expected)), expected)
    with ocp_v0.StandardCheckpointer() as checkpointer:
        assert_same_bits(checkpointer.restore(destination / "checkpoint" / "state", abstract(expected)), expected)
    assert_same_bits(load_params(open_weights(destination)), expected)
    assert_same_bits(load_params(open_weights(source)), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_casts_every_parameter(dtype: str, tmp_path: Path, destination: Path) -> None:
    tensors = random_hf_tensors(tiny.TINY)
    source = write_hf_checkpoint(tmp_path / "hf", tiny.TINY, tensors)
    assert main(["hf2jax", str(source), str(destination), "--dtype", dtype]) == 0
    expected = {path: array.astype(jnp.dtype(dtype)) for path, array in expected_params(tiny.TINY, tensors).items()}
    assert_same_bits(ocp.load(str(destination / "checkpoint"), abstract(expected)), expected)
    assert json.loads((destination / "conversion.json").read_text())["dtype"] == dtype


def test_tensors_of_several_dtypes_keep_their_own_and_their_stack_holds_them_all(tmp_path: Path, destination: Path) -> None:
    tensors = random_hf_tensors(tiny.UNIFORM, dtype=BF16)
    norm, gate = ("model.language_model.layers.{}." + name for name in ("input_layernorm.weight", "mlp.gate.weight"))
    tensors[norm.format(1)] = tensors[norm.format(1)].astype(np.float16)
    for layer in range(3):
        tensors[gate.format(layer)] = random_hf_tensors(tiny.UNIFORM)[gate.format(layer)]
    source = write_hf_checkpoint(tmp_path / "hf", tiny.UNIFORM, tensors)
    assert main(["hf2jax", str(source), str(destination)]) == 0
    params = flatten(load_params(open_weights(destination)))
    base = "model/language_model/layers/"
    assert params[base + "mlp/gate/weight"].dtype == np.float32
    assert params[base + "mlp/experts/down_proj"].dtype == BF16
    stacked = params[base + "input_layernorm/weight"]
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(stacked, np.stack([tensors[norm.format(i)].astype(np.float32) for i in range(3)]))
    recorded = json.loads((destination / "conversion.json").read_text())["tensors"]
    assert [recorded[norm.format(i)]["dtype"] for i in range(3)] == ["BF16", "F16", "BF16"]


@pytest.mark.parametrize("converted", [False, True])
def test_parameters_arrive_sharded_and_cast(converted: bool, source: Path, destination: Path) -> None:
    assert main(["hf2jax", str(source), str(destination)]) == 0
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    directory = destination if converted else source
    params = flatten(load_params(open_weights(directory), dtype=jnp.float32, mesh=mesh))
    expected = expected_params(tiny.TINY, random_hf_tensors(tiny.TINY, dtype=BF16))
    assert_same_bits(nest(params), {path: array.astype(np.float32) for path, array in expected.items()})
    experts = params["model/language_model/layers/2/mlp/experts/gate_up_proj"]
    assert experts.sharding.spec == PartitionSpec(None, "expert", "fsdp", None, "tensor")
    assert experts.addressable_shards[0].data.shape == (3, 4, 32, 2, 12)


def test_conversion_json_says_what_came_from_where(source: Path, destination: Path) -> None:
    assert main(["hf2jax", str(source), str(destination)]) == 0
    record = json.loads((destination / "conversion.json").read_text())
    assert record["source"] == {"name": "hf", "revision": None}
    assert (record["expert_layout"], record["dtype"], record["tied_lm_head"]) == ("hub", "keep", None)
    tensors = random_hf_tensors(tiny.TINY, dtype=BF16)
    assert record["tensors"] == {
        key: {"dtype": "BF16", "shape": list(tensor.shape), "crc32": f"{zlib.crc32(tensor.tobytes()):08x}"}
        for key, tensor in tensors.items()
    }


def test_a_hub_cache_gives_the_repository_and_its_revision(tmp_path: Path, destination: Path) -> None:
    snapshot_dir = tmp_path / "models--Qwen--Qwen3-VL-4B-Instruct" / "snapshots" / "0123abc"
    write_hf_checkpoint(snapshot_dir, tiny.DENSE, random_hf_tensors(tiny.DENSE))
    assert main(["hf2jax", str(snapshot_dir), str(destination)]) == 0
    record = json.loads((destination / "conversion.json").read_text())
    assert record["source"] == {"name": "Qwen/Qwen3-VL-4B-Instruct", "revision": "0123abc"}


def test_a_tied_model_may_repeat_its_embedding_as_the_head(tmp_path: Path, destination: Path) -> None:
    tensors = random_hf_tensors(tiny.DENSE_TIED, dtype=BF16)
    embedding = tensors["model.language_model.embed_tokens.weight"]
    source = write_hf_checkpoint(tmp_path / "hf", tiny.DENSE_TIED, tensors | {"lm_head.weight": embedding})
    assert main(["hf2jax", str(source), str(destination)]) == 0
    record = json.loads((destination / "conversion.json").read_text())
    assert record["tied_lm_head"] == record["tensors"]["model.language_model.embed_tokens.weight"]
    assert "lm_head.weight" not in record["tensors"]
    assert "lm_head/weight" not in flatten(load_params(open_weights(destination)))


def test_side_files_are_copied_verbatim_and_weights_are_not(source: Path, destination: Path) -> None:
    side = {"tokenizer.json": b'{"a":\n 1}', "chat_template.jinja": b"{{ x }}\r\n", "merges.txt": b"a b\n", "LICENSE": b"Apache"}
    for name, content in side.items():
        (source / name).write_bytes(content)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "extra.safetensors").write_bytes(b"not read, not in the index")
    (source / "onnx.json").mkdir()
    assert main(["hf2jax", str(source), str(destination)]) == 0
    assert {path.name for path in destination.iterdir()} == {*side, "config.json", "conversion.json", "checkpoint"}
    for name in (*side, "config.json"):
        assert (destination / name).read_bytes() == (source / name).read_bytes()


def test_the_last_line_sums_up(source: Path, destination: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf2jax", str(source), str(destination)]) == 0
    out, err = capsys.readouterr()
    count = sum(tensor.size for tensor in random_hf_tensors(tiny.TINY).values())
    assert out.splitlines()[-1].startswith(f"{destination}: 145 tensors, {count:,} parameters, {2 * count:,} bytes read, ")
    assert err == ""


def test_saving_gives_back_the_files_in_the_hub_layout(tmp_path: Path) -> None:
    source = write_hf_checkpoint(tmp_path / "hf", tiny.MIXED, random_hf_tensors(tiny.MIXED, dtype=BF16, layout="v5"))
    config = Qwen3VLMoeConfig.from_json(source)
    save_hf(tmp_path / "saved", config, load_params(open_weights(source)), max_shard_size=200_000)
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 3
    found = {key: tensor for shard in shards for key, tensor in safetensors.numpy.load_file(shard).items()}
    assert_same_bits(found, random_hf_tensors(tiny.MIXED, dtype=BF16))
    assert open_weights(tmp_path / "saved").config == config
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_saving_into_a_used_directory_or_another_tree_is_refused(source: Path, tmp_path: Path) -> None:
    config = Qwen3VLMoeConfig.from_json(source)
    params = load_params(open_weights(source))
    before = snapshot(source)
    with pytest.raises(CheckpointError, match="not empty"):
        save_hf(source, config, params)
    assert snapshot(source) == before
    del params["lm_head"]
    with pytest.raises(CheckpointError, match="missing parameters, first 'lm_head/weight'"):
        save_hf(tmp_path / "saved", config, params)
    assert not (tmp_path / "saved").exists()
