"""What the three commands have in common: a wrong command line, and what they print of it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.tiny_checkpoint import write_checkpoint
from qvlmoe_jax.command_line import print_error

ROOT = Path(__file__).resolve().parent.parent

MISTAKES = [
    ("convert", []),
    ("convert", ["hf2jax", "SRC"]),
    ("qvlmoe_jax", ["generate"]),
    ("train", ["export"]),
    ("train", ["export", "RUN", "DST", "--dtype", "float16"]),
    ("train", ["plan", "--topology", "v5p:4x4x4"]),
    ("train", ["plan", "CONFIG.yaml", "--topology", "v5p:4x4x4", "--programs", "many"]),
]


@pytest.mark.parametrize(
    ("command", "arguments"), MISTAKES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_mistake_is_one_line_and_status_2(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"{command}.__main__").main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and printed.err.rstrip().endswith("--help")


def test_what_a_message_quotes_reaches_no_terminal_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ValueError("a\nfile\x1b[2J and \udcff"))
    assert capsys.readouterr().err == "error: a file\\x1b[2J and \\udcff\n"


@pytest.mark.parametrize("arguments", [["inspect", "{model}"], ["--help"]], ids=["a command", "help"])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    arguments = [a.format(model=tmp_path / "model") for a in arguments]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "convert", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert done.stderr == ""


def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "convert", "inspect", str(tmp_path / "model")]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr == "error: [Errno 28] No space left on device\n"


def in_ascii(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python as a process of its own, on a terminal that shows ASCII only."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_name_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "\xfc")
    result = in_ascii("-m", "convert", "inspect", str(tmp_path / "\xfc"))
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "\\xfc") in result.stdout


@pytest.mark.parametrize("command", ["convert", "train", "qvlmoe_jax"])
def test_each_command_prints_any_text(command: str) -> None:
    result = in_ascii("-c", f"from {command}.__main__ import main; main(['--no-such']); print('\\xfc \\u732b \\udcff')")
    assert (result.returncode, result.stdout) == (0, "\\xfc \\u732b \\udcff\n"), result.stderr
