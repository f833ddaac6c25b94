"""A converted directory that is damaged, or does not match its config, is refused when it is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from convert.__main__ import main
from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.errors import CheckpointError
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.tiny import variant


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    source = write_hf_checkpoint(directory / "hf", tiny.TINY, random_hf_tensors(tiny.TINY))
    assert main(["hf2jax", str(source), str(directory / "jax")]) == 0
    return directory / "jax"


def test_a_converted_directory_is_no_source(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf2jax", str(converted), str(tmp_path / "new")]) == 2
    assert "already a converted directory, expected a Hugging Face checkpoint" in capsys.readouterr().err


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_config(directory: Path, **text: Any) -> None:
    (directory / "config.json").write_text(json.dumps(variant(tiny.TINY, text_config=text)))


def cut(paths: Iterable[Path]) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: shutil.rmtree(d / "checkpoint"), "checkpoint: not found, expected the Orbax checkpoint"),
        (lambda d: (d / "conversion.json").write_text("{"), "conversion.json: not valid JSON"),
        (lambda d: edit_json(d / "conversion.json", table_version=99), "table_version is 99, expected 1"),
        (lambda d: rewrite_config(d, num_hidden_layers=6), r"has shape \[3, .* expected \[4, "),
        (lambda d: rewrite_config(d, vocab_size=257), r"embed_tokens/weight' has shape \[256, 64\], expected \[257, 64\]"),
        (lambda d: rewrite_config(d, mlp_only_layers=[]), "missing parameters, first 'model/language_model/layers/input"),
        (lambda d: shutil.rmtree(d / "checkpoint" / "state"), "expected a whole Orbax checkpoint"),
        (lambda d: cut([d / "checkpoint" / "state" / "_METADATA"]), "expected a whole Orbax checkpoint"),
    ],
    ids=["no data", "bad record", "other table", "more layers", "other vocabulary", "other stacks", "no state", "cut metadata"],
)
def test_a_damaged_converted_directory_is_refused(
    damage: Callable[[Path], None], expected: str, converted: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(converted, tmp_path / "jax")
    damage(directory)
    with pytest.raises(CheckpointError, match=expected):
        Qwen3VLMoeForConditionalGeneration.from_pretrained(directory)


def test_cut_data_is_refused(converted: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(converted, tmp_path / "jax")
    cut(path for path in (directory / "checkpoint").rglob("c/**/*") if path.is_file())
    with pytest.raises(CheckpointError, match=f"{directory / 'checkpoint'}.*: expected a whole Orbax checkpoint"):
        Qwen3VLMoeForConditionalGeneration.from_pretrained(directory)


def test_lost_data_is_refused_not_read_as_zeros(converted: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(converted, tmp_path / "jax")
    next(path for path in (directory / "checkpoint").rglob("c/**/*") if path.is_file()).unlink()
    with pytest.raises(CheckpointError, match=f"{directory / 'checkpoint'}.*: expected a whole Orbax checkpoint"):
        Qwen3VLMoeForConditionalGeneration.from_pretrained(directory)
