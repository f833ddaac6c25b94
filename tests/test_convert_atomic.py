"""`hf2jax` and the file system: DST appears whole or not at all, whatever stands in the way or goes wrong."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest

from convert.__main__ import main
from convert.orbax_stream import LeafWriter, Piece
from tests import tiny
from tests.hf_checkpoints import random_hf_tensors, snapshot, write_hf_checkpoint

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path / "hf", tiny.TINY, random_hf_tensors(tiny.TINY, dtype=ml_dtypes.bfloat16), shards=3)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "jax"


def test_an_existing_directory_is_replaced_only_when_asked(source: Path, destination: Path, capsys: Captured) -> None:
    assert main(["hf2jax", str(source), str(destination)]) == 0
    before = snapshot(destination)
    capsys.readouterr()
    assert main(["hf2jax", str(source), str(destination)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert snapshot(destination) == before
    assert main(["hf2jax", str(source), str(destination), "--dtype", "float32", "--overwrite"]) == 0
    assert json.loads((destination / "conversion.json").read_text())["dtype"] == "float32"
    assert sorted(path.name for path in destination.parent.iterdir()) == ["hf", "jax"]


def test_overwrite_removes_nothing_but_a_converted_directory(source: Path, destination: Path, capsys: Captured) -> None:
    destination.mkdir()
    (destination / "thesis.tex").write_text("precious")
    assert main(["hf2jax", str(source), str(destination), "--overwrite"]) == 2
    assert "not a converted directory" in capsys.readouterr().err
    assert (destination / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("leftover", [".converting", ".replaced"])
def test_leftovers_of_a_killed_run_are_refused_by_name(leftover: str, source: Path, destination: Path, capsys: Captured) -> None:
    path = destination.with_name(destination.name + leftover)
    path.mkdir()
    (path / "half").write_text("written")
    assert main(["hf2jax", str(source), str(destination), "--overwrite"]) == 2
    assert str(path) in capsys.readouterr().err
    assert not destination.exists()
    assert (path / "half").read_text() == "written"


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_source_and_destination_must_lie_apart(place: str, source: Path, capsys: Captured) -> None:
    before = snapshot(source.parent)
    assert main(["hf2jax", str(source), str(source / place), "--overwrite"]) == 2
    assert "SRC" in capsys.readouterr().err
    assert snapshot(source.parent) == before


def test_a_name_that_orbax_cannot_write_is_refused(source: Path, tmp_path: Path, capsys: Captured) -> None:
    """A byte of the command line that is no UTF-8 comes as a lone surrogate; TensorStore raised on it, all the data written."""
    assert main(["hf2jax", str(source), str(tmp_path / "jax\udcff")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not UTF-8, which Orbax needs" in error
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_a_run_that_fails_changes_nothing_and_can_be_resumed(
    failure: BaseException,
    existing: bool,
    source: Path,
    destination: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    before = {}
    if existing:
        assert main(["hf2jax", str(source), str(destination), "--dtype", "float32"]) == 0
        before = snapshot(destination)
        capsys.readouterr()
    write, written = LeafWriter.write, []

    def fail(self: LeafWriter, data: Any) -> Iterator[Piece]:
        for piece in write(self, data):
            written.append(piece)
            yield piece
            if len(written) == 20:
                raise failure

    argv = ["hf2jax", str(source), str(destination), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(LeafWriter, "write", fail)
        if isinstance(failure, RuntimeError):  # not the user's error: the traceback is wanted
            with pytest.raises(RuntimeError):
                main(argv)
        else:
            assert main(argv) == (130 if isinstance(failure, KeyboardInterrupt) else 2)
            assert len(capsys.readouterr().err.splitlines()) == 1
    assert (snapshot(destination) if existing else {}) == before
    assert destination.exists() == existing

    assert main(argv) == 2
    assert "give --resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert "are there already" in capsys.readouterr().out
    assert main(["verify", str(source), str(destination)]) == 0
    assert sorted(path.name for path in destination.parent.iterdir()) == ["hf", "jax"]


def test_an_old_directory_comes_back_if_the_new_one_cannot_take_its_place(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["hf2jax", str(source), str(destination)]) == 0
    before = snapshot(destination)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.parent.name.endswith(".converting") and self.name == "result":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        assert main(["hf2jax", str(source), str(destination), "--overwrite", "--dtype", "float32"]) == 2
    assert snapshot(destination) == before
    assert main(["hf2jax", str(source), str(destination), "--overwrite", "--dtype", "float32", "--resume"]) == 0
    assert json.loads((destination / "conversion.json").read_text())["dtype"] == "float32"
    assert sorted(path.name for path in destination.parent.iterdir()) == ["hf", "jax"]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=120)


def test_help_and_refusals_do_not_wait_for_jax(tmp_path: Path, source: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    script = "import sys, convert.__main__ as c; print(c.main(sys.argv[1:]), {'jax', 'orbax', 'torch'} & sys.modules.keys())"
    done = run_python("-c", script, "hf2jax", str(source), str(tmp_path / "out"))
    assert done.stdout == "2 set()\n", done
    done = run_python("-X", "importtime", "-m", "convert", "--help")
    assert done.returncode == 0
    assert "hf2jax" in done.stdout
    assert not {line.split("|")[-1].strip() for line in done.stderr.splitlines()} & {"jax", "orbax", "torch"}


def test_the_module_runs_as_a_command(source: Path, destination: Path) -> None:
    done = run_python("-m", "convert", "hf2jax", str(source), str(destination))
    assert (done.returncode, done.stderr) == (0, "")
    assert (destination / "checkpoint").is_dir()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["jax2hf", "a"],
        ["jax2hf", "a", "b", "--max-shard-size", "big"],
        ["hf2jax", "a"],
        ["hf2jax", "a", "b", "--dtype", "int8"],
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "--help" in err


@pytest.mark.parametrize("room", [0, 1 << 8, 1 << 12], ids=["no side file", "no reserve", "no weights"])
def test_a_disk_that_takes_no_more_is_one_line_with_the_file(
    room: int, source: Path, destination: Path, capsys: Captured
) -> None:
    (source / "merges.txt").write_text("a b")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))  # Python ignores the signal: the write fails
    try:
        assert main(["hf2jax", str(source), str(destination)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(destination) + ".converting/" in error
    assert main(["hf2jax", str(source), str(destination), "--resume"]) == 0
