"""A hub repository as the source: from the hub's cache where it is, and one line where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import pytest

from qvlmoe_jax.checkpoint import load_params, open_weights
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.test_convert import assert_same_bits, expected_params

ROOT = Path(__file__).parents[1]
REPOSITORY, REVISION = "Qwen/Qwen3-VL-30B-A3B-Instruct", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME with one repository in its cache: a snapshot of links to blobs."""
    home = tmp_path_factory.mktemp("home")
    written = write_hf_checkpoint(home / "written", tiny.TINY, random_hf_tensors(tiny.TINY, dtype=ml_dtypes.bfloat16), shards=2)
    (written / "tokenizer.json").write_text('{"model": {}}')
    repository = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    for place in (snapshot, blobs, repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for i, file in enumerate(sorted(written.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    return home


def convert(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    return subprocess.run(
        [sys.executable, "-m", "convert", *map(str, arguments)],
        cwd=ROOT, env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_repository_in_the_cache_is_converted_offline(home: Path, tmp_path: Path) -> None:
    done = convert(home, "hf2jax", REPOSITORY, tmp_path / "jax")
    assert done.returncode == 0, done.stderr
    expected = expected_params(tiny.TINY, random_hf_tensors(tiny.TINY, dtype=ml_dtypes.bfloat16))
    assert_same_bits(load_params(open_weights(tmp_path / "jax")), expected)
    record = json.loads((tmp_path / "jax" / "conversion.json").read_text())
    assert record["source"] == {"name": REPOSITORY, "revision": REVISION}
    copied = [path for path in (tmp_path / "jax").iterdir() if path.is_symlink()]
    assert copied == []
    assert (tmp_path / "jax" / "tokenizer.json").read_text() == '{"model": {}}'


@pytest.mark.parametrize("command", [["hf2jax", "Qwen/Absent", "jax"], ["inspect", "Qwen/Absent"]], ids=["hf2jax", "inspect"])
def test_an_absent_one_is_one_line_that_says_offline(command: list[str], home: Path, tmp_path: Path) -> None:
    done = convert(home, *(tmp_path / part if part == "jax" else part for part in command))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: Qwen/Absent: no such directory")
    assert "offline" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_library_takes_a_repositorys_name_too(home: Path) -> None:
    code = (
        "from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration as Model, Processor\n"
        f"model = Model.from_pretrained({REPOSITORY!r})\n"
        "print(model.get_input_embeddings().weight.dtype)\n"
        "for open_ in (Model.from_pretrained, Processor.from_pretrained):\n"
        "    try: open_('Qwen/Absent')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    dtype, *refusals = done.stdout.splitlines()
    assert dtype == "bfloat16" and len(refusals) == 2
    assert all("Qwen/Absent: no such directory, and the hub repository" in line for line in refusals)
