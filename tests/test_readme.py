"""The documentation is run: its commands in order in an empty directory, its table of parameters against the code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.hf import expand, rows_by_path
from tests import tiny

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
                command, *arguments = line.split()
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


ROW = re.compile(r"^\| `(?P<path>[\w/]+)` \| `\[(?P<shape>.+?)\]` \| `\[(?P<hf_shape>.+?)\]` \|", re.MULTILINE)


def letters(config: Qwen3VLMoeConfig, num_layers: int) -> dict[str, int]:
    """The page's legend."""
    text, vision = config.text_config, config.vision_config
    return {
        "L": num_layers, "D": text.hidden_size, "N": text.num_attention_heads, "K": text.num_key_value_heads, "H": text.head_dim,
        "E": text.num_experts, "F": text.moe_intermediate_size, "I": text.intermediate_size, "V": text.vocab_size,
        "Z": vision.depth, "W": vision.hidden_size, "A": vision.num_heads, "B": vision.head_dim, "J": vision.intermediate_size,
        "X": vision.patch_width, "S": vision.num_position_embeddings, "M": vision.merge_unit * vision.hidden_size,
        "Q": len(vision.deepstack_visual_indexes), "in_channels": vision.in_channels, "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }  # fmt: skip


def evaluate(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(eval(size, {"__builtins__": {}}, dict(sizes))) for size in shape.split(","))


@pytest.mark.parametrize("name", ["uniform", "other", "mixed", "dense_tied"])
def test_the_table_of_parameters_is_the_codes(name: str) -> None:
    config = Qwen3VLMoeConfig.from_hf(tiny.ALL[name])
    table = {match["path"]: (match["shape"], match["hf_shape"]) for match in ROW.finditer(CHECKPOINT.read_text())}
    for path, rows in rows_by_path(expand(config)).items():
        shape, hf_shape = table[re.sub(r"/layers/\d+/", "/layers/", path)]
        sizes = letters(config, len(rows))
        assert evaluate(hf_shape, sizes) == rows[0].hf_shape, path
        stacked = (len(rows),) if rows[0].index else ()
        assert evaluate(shape, sizes) == stacked + rows[0].shape, path


def test_the_table_lists_nothing_else() -> None:
    table = {match["path"] for match in ROW.finditer(CHECKPOINT.read_text())}
    known: set[str] = set()
    for config_dict in (tiny.UNIFORM, tiny.MIXED):
        paths = rows_by_path(expand(Qwen3VLMoeConfig.from_hf(config_dict)))
        known |= {re.sub(r"/layers/\d+/", "/layers/", path) for path in paths}
    assert table == known
