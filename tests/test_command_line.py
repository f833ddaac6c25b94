"""What the three commands have in common: a wrong command line, and what they print of it."""

from __future__ import annotations

import importlib

import pytest

from qvlmoe_jax.command_line import print_error

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
