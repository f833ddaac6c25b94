"""The documentation is run: its commands and examples, in order, in an empty directory."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING, CHECKPOINT = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "checkpoint.md"
BLOCK = re.compile(r"(?P<skip><!-- not run by the tests: [^\n]+ -->\n)?```(?P<language>sh|python)\n(?P<code>.*?)```", re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of the page's code blocks, but those that say why they are not run."""
    return [(match["language"], match["code"]) for match in BLOCK.finditer(page.read_text()) if not match["skip"]]


def make_targets(page: Path) -> list[str]:
    lines = [line for language, code in blocks(page) if language == "sh" for line in code.splitlines()]
    return [line.split()[1] for line in lines if line.startswith("make ")]


def run(command: list[str], directory: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def recipe(target: str) -> list[str]:
    """What `make TARGET` would run in an environment that is there; make itself writes nothing."""
    command = ["make", "--dry-run", "--no-print-directory", "VENV=no-such-directory", target]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[-1].replace("no-such-directory/bin/python", sys.executable).split()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory where `make demo` has run, and what it printed. The environment is the tests' own."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "examples").symlink_to(ROOT / "examples")
    return directory, run(recipe("demo"), directory)


def test_the_demo_agrees_with_transformers_and_with_the_stored_logits(demo: tuple[Path, str]) -> None:
    parity = [line for line in demo[1].splitlines() if line.startswith("parity")]
    references = [*(["transformers"] if importlib.util.find_spec("torch") else []), "stored"]
    assert len(parity) == len(references)
    assert all(reference in line for reference, line in zip(references, parity, strict=True))
    assert all("from HF" in line and "converted" in line and line.endswith("OK") for line in parity)


@pytest.mark.parametrize("page", [README, CHECKPOINT], ids=lambda page: page.name)
def test_every_block_runs(page: Path, demo: tuple[Path, str]) -> None:
    ran = 0
    for language, code in blocks(page):
        if language == "python":
            assert run([sys.executable, "-c", code], demo[0]).strip()
            ran += 1
            continue
        for line in code.splitlines():
            if not line.startswith("make "):
                command, *arguments = shlex.split(line, comments=True)
                assert command == "python"
                run([sys.executable, *arguments], demo[0])
                ran += 1
    assert ran


def test_every_word_of_the_pages_is_a_chore_and_ci_runs_the_readmes() -> None:
    for target in make_targets(README) + make_targets(CONTRIBUTING):
        assert recipe(target)
    ci = (ROOT / ".ci" / "run").read_text()
    assert make_targets(README)
    assert all(f"make {target}" in ci for target in make_targets(README))
