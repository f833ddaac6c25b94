"""What a user installs: the wheel with no extras, in an environment of its own, where there is no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.xla_flags import ONE_DEVICE

ROOT = Path(__file__).resolve().parent.parent

FORWARD = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None, "torch is installed: this proves nothing"
import jax, numpy as np
from flax import nnx
import qvlmoe_jax
from tiny_checkpoint import CONFIG

assert "site-packages" in qvlmoe_jax.__file__, qvlmoe_jax.__file__
model = qvlmoe_jax.Qwen3VLMoeForConditionalGeneration.from_config(CONFIG, nnx.Rngs(0))
batch = qvlmoe_jax.Batch.from_hf(model.config, input_ids=np.arange(12).reshape(2, 6))
logits = jax.jit(lambda model, batch: model(batch).logits)(model, batch)
assert logits.shape[2] == model.config.text_config.vocab_size and bool(np.isfinite(logits).all())
print(*logits.shape)
"""


def run(*command: str | Path, directory: Path) -> str:
    result = subprocess.run(list(map(str, command)), cwd=directory, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_the_wheel_works_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the wheel, not the working tree
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "tests", "build", "dist", "*.egg-info", "__pycache__", "demo_out")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, directory=source)
    (wheel,) = tmp_path.glob("*.whl")

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, directory=tmp_path)
    shutil.copytree(source / "examples", tmp_path / "examples")
    shutil.copy(source / "LICENSE", tmp_path)

    installed = run(python, "-m", "pip", "list", "--format=freeze", directory=tmp_path)
    assert not [line for line in installed.lower().splitlines() if line.startswith(("torch", "nvidia"))]
    (tmp_path / "examples" / "forward.py").write_text(FORWARD)
    assert run(python, "examples/forward.py", directory=tmp_path).split()[-3:] == ["2", "8", "512"]

    script = tmp_path / "venv" / "bin" / "qvlmoe-convert"
    assert "hf2jax" in run(script, "--help", directory=tmp_path)
    parity = [line for line in run(python, "examples/demo.py", directory=tmp_path).splitlines() if line.startswith("parity")]
    assert len(parity) == 1  # no torch: the stored logits are the only reference
    assert "stored" in parity[0] and parity[0].endswith("OK")
