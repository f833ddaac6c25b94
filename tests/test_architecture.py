"""What the source promises about itself: one-way imports, short files, jax only for work, explained names."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qvlmoe_jax
from qvlmoe_jax import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tuple(name for name in ("qvlmoe_jax", "convert", "train") if (ROOT / name).is_dir())
SOURCES = tuple(sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")))
MAX_LINES = 400

FORBIDDEN = {  # package -> top-level modules it may not import, at any depth of its code
    "qvlmoe_jax": {"torch", "convert", "train"},
    "convert": {"torch", "train"},
    "train": {"torch", "convert"},
}
HEAVY = ("jax", "jaxlib", "flax", "orbax", "torch", "transformers")

by_file = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def imported_modules(tree: ast.AST) -> set[str]:
    """Top-level names of every import statement, those inside functions and TYPE_CHECKING too, and of `import_module("...")`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def test_the_walk_sees_every_form_of_import() -> None:
    code = "import a.b\ndef f():\n    from c import d\nif x:\n    import e as g\nimportlib.import_module('h.i')\nfrom . import j"
    assert imported_modules(ast.parse(code)) == {"a", "c", "e", "h"}


@by_file
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not imported_modules(ast.parse(path.read_text())) & FORBIDDEN[package]


@by_file
def test_files_hold_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@by_file
def test_public_names_are_explained(path: Path) -> None:
    tree = ast.parse(path.read_text())
    unexplained = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not unexplained
    assert ast.get_docstring(tree), "the module itself"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


PRINT_HEAVY = f"""
import sys
print("heavy:", *(name for name in {HEAVY} if name in sys.modules))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import qvlmoe_jax, qvlmoe_jax.errors; qvlmoe_jax.Qwen3VLMoeConfig; dir(qvlmoe_jax)",
        "import qvlmoe_jax.config, qvlmoe_jax.layer_plan, qvlmoe_jax.hf, qvlmoe_jax.safetensors_io",
        "import convert.__main__ as c; assert c.main(['hf2jax', 'nonexistent', 'never']) == 2",
        "import qvlmoe_jax.__main__ as c; assert c.main(['generate', 'nonexistent', '--prompt', 'hi']) == 2",
        "import qvlmoe_jax.__main__ as c\ntry: c.main(['generate', '--help'])\nexcept SystemExit as end: assert end.code == 0",
        "import convert.__main__ as c\ntry: c.main(['--help'])\nexcept SystemExit as end: assert end.code == 0",
        "import convert.__main__ as c\ntry: c.main(['hf2jax', '--help'])\nexcept SystemExit as end: assert end.code == 0",
    ],
    ids=[
        "public names",
        "config and table",
        "refusing bad input",
        "refusing to generate",
        "help of generate",
        "help",
        "help of a command",
    ],
)
def test_jax_waits_until_it_is_needed(code: str) -> None:
    result = python(code + PRINT_HEAVY)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy:"


def test_no_module_loads_torch() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    imports = "; ".join(f"import {name.removesuffix('.__init__')}" for name in modules)
    result = python(f"{imports}; import sys; print('torch' in sys.modules, 'jax' in sys.modules)")
    assert result.stdout.split() == ["False", "True"], result.stderr


def test_the_wheel_holds_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}


def test_every_public_name_resolves() -> None:
    assert set(qvlmoe_jax.__all__) <= set(dir(qvlmoe_jax))
    for name in qvlmoe_jax.__all__:
        assert getattr(qvlmoe_jax, name) is not None
    assert qvlmoe_jax.ModelClass is qvlmoe_jax.Qwen3VLMoeForConditionalGeneration
    with pytest.raises(AttributeError, match="no attribute 'Qwen4'"):
        _ = qvlmoe_jax.Qwen4


def test_every_error_is_the_users_error() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) > 3
    assert all(issubclass(value, errors.QvlmoeError) and issubclass(value, ValueError) for value in classes)
