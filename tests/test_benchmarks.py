"""The benchmarks measure what they say, on small models: the figures themselves are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accelerator, pairs
from benchmarks.true_widths import true_widths
from qvlmoe_jax import BackendConfig, Qwen3VLMoeConfig
from tests import training

ROOT = Path(__file__).parents[1]


def test_pairs_alternate_and_the_ratio_is_that_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(pairs, "clock", lambda: now[0])

    def call(name: str, seconds: float) -> pairs.Call:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    slow, quick = call("slow setting", 9.0), call("quick setting", 3.0)
    row = pairs.compare("row", call("ours", 2.0), {"slow": slow, "quick": quick}, pairs=4, per=(10, "tokens"))
    assert row.setting == "quick" and row.ratio == 1.5 and row.spread == (1.5, 1.5)
    assert order[-8:] == ["ours", "quick setting", "quick setting", "ours"] * 2
    assert len(row.ours) == len(row.theirs) == 4


def test_true_widths_are_the_released_ones() -> None:
    config = Qwen3VLMoeConfig.from_hf(true_widths(2))
    text = config.text_config
    assert (text.hidden_size, text.num_experts, text.moe_intermediate_size, text.num_hidden_layers) == (2048, 128, 768, 2)
    assert config.vision_config.depth == 27


def test_without_an_accelerator_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerator"])
    assert accelerator.main() == 2
    assert "needs a GPU or a TPU" in capsys.readouterr().err


@pytest.mark.soak
def test_the_accelerators_rows_run() -> None:
    config = Qwen3VLMoeConfig.from_hf(training.SMALL)
    rows = list(accelerator.measure(config, BackendConfig(remat="full"), rows=1, tokens=32, rounds=2, patches=64, new_tokens=4))
    assert [row.name.split(",")[0] for row in rows] == ["forward", "vision tower", "decode", "decode", "train step"]
    assert all(min(row.seconds) > 0 for row in rows if not row.name.startswith("decode"))
    assert all(row.flops for row in rows if not row.name.startswith("decode"))
    assert "%" in rows[-1].line(peak=1.0) and rows[0].line(peak=None).count("|") == 7


@pytest.mark.parametrize(
    "flags, said", [(["--pairs", "0"], "--pairs 0, expected 1 or more"), (["--out", "/no/such/t"], "no directory")]
)
def test_the_table_refuses_before_it_measures(flags: list[str], said: str) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "benchmarks.table", "--rows", "", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
def test_the_table_is_written(tmp_path: Path) -> None:
    """One cheap row, in its own process: the module settles threads before jax is imported."""
    pytest.importorskip("torch")
    before = {"rows": [], "growth": [{"what": "tokens", "sizes": [1, 2], "ours": [1.0, 2.0], "theirs": [2.0, 4.0]}]}
    (tmp_path / "table.json").write_text(json.dumps(before))
    options = ["--rows", "experts", "--pairs", "1", "--limit", "1", "--add", "--out", str(tmp_path / "table")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", *options],
        capture_output=True, text=True, timeout=600, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "table.json").read_text())
    assert figures["growth"] == before["growth"]
    assert {row["name"] for row in figures["rows"]} == {f"experts, {n} tokens" for n in (1, 64, 512, 2048)}
    assert figures["machine"]["cores"] >= 1 and figures["versions"]["transformers"]
    assert "| experts, 512 tokens | tokens |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 1000
