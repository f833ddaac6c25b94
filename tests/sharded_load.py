"""One of several jax.distributed processes that load a sharded model: `python -m tests.sharded_load PLAN.json PROCESS`.

Writes PLAN's `out` + `.PROCESS.json`: for each case the bytes that were read from files, this process's share of the
parameters' bytes on disk, the largest array that was read at once, the largest shard, and the logits of its rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration, zarr_files
from qvlmoe_jax.checkpoint import ParamStore, load_params, open_weights
from qvlmoe_jax.hf_weights import HFWeights
from qvlmoe_jax.param_tree import flatten
from qvlmoe_jax.sharding import make_mesh, shard_batch
from tests import ours

_COPIED = [0]


def bytes_read() -> int:
    """By TensorStore, and out of mapped files (copied parts and indexes)."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"]) + _COPIED[0]


def counted(largest: list[int]) -> None:
    """Keeps in `largest[0]` the most bytes that one `read` of any store returned; counts what leaves mapped files."""

    def copy_into(target: np.ndarray, source: np.ndarray, _copy: Any = zarr_files.copy_into) -> None:
        _COPIED[0] += source.nbytes
        _copy(target, source)

    def crc32c(data: bytes, _crc32c: Any = zarr_files.crc32c) -> int:
        _COPIED[0] += len(data)
        return _crc32c(data)

    zarr_files.copy_into, zarr_files.crc32c = copy_into, crc32c  # type: ignore[assignment]
    for store in (ParamStore, HFWeights):

        def read(self: Any, *args: Any, _read: Any = store.read, **options: Any) -> np.ndarray:
            array = _read(self, *args, **options)
            largest[0] = max(largest[0], array.nbytes)
            return array

        store.read = read  # type: ignore[method-assign]


@jax.jit
def forward(model: Qwen3VLMoeForConditionalGeneration, batch: Any) -> jax.Array:
    return model(batch).logits


def case(
    directory: str, sizes: dict[str, Any], config: dict[str, Any], inputs: Mapping[str, np.ndarray], largest: list[int]
) -> dict[str, Any]:
    mesh = make_mesh(**sizes)
    before, largest[0] = bytes_read(), 0
    weights = open_weights(directory)
    params = load_params(weights, mesh=mesh)
    read = bytes_read() - before
    share = shard = 0
    for path, leaf in flatten(params).items():
        pieces = {str(s.index): s.data.size * weights.dtypes[path].itemsize for s in leaf.addressable_shards}
        share += sum(pieces.values())
        shard = max(shard, *pieces.values())
    model = Qwen3VLMoeForConditionalGeneration.abstract(weights.config).with_params(
        jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    )
    batch = ours.make_batch(config, inputs)
    with jax.set_mesh(mesh):
        logits = forward(model, shard_batch(batch, mesh))
        logits = jax.device_put(logits, NamedSharding(mesh, PartitionSpec()))
    return {
        "read": read,
        "share": share,
        "largest": largest[0],
        "shard": shard,
        "logits": np.asarray(multihost_utils.process_allgather(logits, tiled=True)).tolist(),
    }


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    process = int(sys.argv[2])
    jax.distributed.initialize(f"localhost:{plan['port']}", plan["processes"], process)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    with np.load(plan["inputs"]) as file:
        inputs = dict(file)
    largest = [0]
    counted(largest)
    results = [case(directory, sizes, plan["config"], inputs, largest) for directory, sizes in plan["cases"]]
    Path(f"{plan['out']}.{process}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
