"""The parity notebook: what is committed is its source, executed; and it executes, from a fresh copy, on any checkpoint."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xla_flags import ONE_DEVICE

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, MAX_BYTES, NUM_FIGURES = ROOT / "notebooks" / "parity.ipynb", 1_000_000, 6
CPU_SECONDS = 300  # on an idle machine the wall clock shows less than that; a busy one must not fail the test

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")


def run(command: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without this tree on the path: what runs is what lies in `directory`."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MODEL", "WORK")}
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE, "IPYTHONDIR": str(directory / ".ipython")}
    return subprocess.run(command, cwd=directory, env=inherited | own | environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git would give a newcomer of this tree, as it is now."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what a fresh clone holds is not known")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def execute(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "notebooks/execute.py", "--out", "out.ipynb"], clone, **environment)


def printed(file: Path) -> str:
    cells = nbformat.read(file, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def figures(file: Path) -> int:
    outputs = [output for cell in nbformat.read(file, as_version=4).cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check(file: Path) -> None:
    """Every cell ran in order and without a complaint, and all pictures are there."""
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    assert figures(file) == NUM_FIGURES
    assert file.stat().st_size < MAX_BYTES


def test_the_committed_notebook_is_the_source_executed() -> None:
    import jupytext

    source = jupytext.read(NOTEBOOK.with_suffix(".py")).cells
    committed = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [(cell.cell_type, cell.source) for cell in committed] == [(cell.cell_type, cell.source) for cell in source]
    check(NOTEBOOK)
    assert "6 prompts within the bound, 11 bugs measured" in printed(NOTEBOOK)
    assert not re.search(r"/(home|work|tmp|root)/", printed(NOTEBOOK)), "a path of the machine it ran on"


@pytest.mark.slow
def test_it_executes_from_a_fresh_clone(clone: Path) -> None:
    pytest.importorskip("torch")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = execute(clone)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    check(clone / "out.ipynb")
    assert "6 prompts within the bound, 11 bugs measured" in printed(clone / "out.ipynb")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(result.stdout, f"{cpu:.0f} s of CPU")
    assert cpu < CPU_SECONDS


@pytest.mark.soak
def test_a_bug_in_the_package_stops_it(clone: Path) -> None:
    """The smallest bug of its own list, in the package's source: the cells' asserts must notice."""
    pytest.importorskip("torch")
    vision = clone / "qvlmoe_jax" / "vision.py"
    right = "gelu(self.linear_fc1(x), approximate=True)"
    assert vision.read_text().count(right) == 1
    vision.write_text(vision.read_text().replace(right, right.replace("True", "False")))
    result = execute(clone)
    assert result.returncode == 1
    assert re.search(r"AssertionError.*picture.* is more than 1.0e-04", result.stderr), result.stderr
    assert not (clone / "out.ipynb").exists()


BLOCK_TORCH = "import sys\nsys.modules['torch'] = None\n"

OTHER_CHECKPOINT = """
import sys
sys.path.insert(0, "examples")
import pathlib, tiny_checkpoint as tiny
tiny.CONFIG["text_config"] |= {text}
tiny.CONFIG["vision_config"] |= {vision}
tiny.CONFIG |= {top}
tiny.write_checkpoint(pathlib.Path("other"))
"""
KINDS = {
    # name -> changes of the text, vision and whole config; pictures drawn; what is printed about the experts
    "dense": (
        {"model_type": "qwen3_vl_text"},
        {"model_type": "qwen3_vl"},
        {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]},
        NUM_FIGURES - 1,
        "this checkpoint is dense",
    ),
    "many experts, every second layer": (
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 12, "decoder_sparse_step": 2},
        {},
        {},
        NUM_FIGURES,
        "choices in 3 layers are transformers'",
    ),
}


@pytest.mark.parametrize(
    ("kind", "torch"),
    [
        pytest.param(kind, torch, marks=pytest.mark.slow if torch and i == 0 else pytest.mark.soak)
        for i, kind in enumerate(KINDS)
        for torch in (True, False)
    ],
)
def test_any_checkpoint(clone: Path, kind: str, torch: bool) -> None:
    """A dense one from Hugging Face's files, a sparse one converted; torch hidden from Python where it must do without."""
    if torch and not importlib.util.find_spec("torch"):
        pytest.skip("torch is not installed")
    text, vision, top, num_figures, says = KINDS[kind]
    made = run([sys.executable, "-c", OTHER_CHECKPOINT.format(text=text, vision=vision, top=top)], clone)
    assert made.returncode == 0, made.stderr
    model = "other"
    if kind != "dense":
        made = run([sys.executable, "-m", "convert", "hf2jax", "other", "converted"], clone)
        assert made.returncode == 0, made.stderr
        model = "converted"
    (clone / "blocked").mkdir()
    (clone / "blocked" / "sitecustomize.py").write_text("" if torch else BLOCK_TORCH)
    result = execute(clone, MODEL=model, PYTHONPATH="blocked" if torch else str(clone / "blocked"))
    assert result.returncode == 0, result.stderr
    output = printed(clone / "out.ipynb")
    assert figures(clone / "out.ipynb") == num_figures - (0 if torch else 1)
    assert ("6 prompts within the bound" in output) == torch
    assert output.count("torch is not installed") == (0 if torch else 5 - (kind == "dense"))
    if torch or kind == "dense":
        assert says in output
