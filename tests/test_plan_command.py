"""The command `python -m train plan` without a TPU compiler: what it refuses, what does not fit, and the sweep's choices."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from tests.test_plan import CONFIGS, step_config
from train import __main__ as command
from train import aot, plan, roofline, topology, wire
from train.config import TrainConfig, dump_config, load_config
from train.errors import DoesNotFit, TrainingError


@pytest.mark.parametrize("name", ["v5p-128", "v5p:4x4", "v9:2x2", "v5e:2x0", "ironwood", ""])
def test_unknown_topologies_are_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=r"expected a kind and the sides.*v5p:4x4x4"):
        topology.Topology.parse(name)


def test_a_mesh_of_another_size_is_refused() -> None:
    config = load_config(CONFIGS / "30b-v6e-8x8.yaml")
    with pytest.raises(TrainingError, match=r"fsdp=8, expert=8\) has 64 devices and v5e:2x2 has 4"):
        plan.check(config, topology.Topology.parse("v5e:2x2"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--programs", "0"], "--programs 0, expected 1 or more"),
        (["--dataset-tokens", "-5"], "expected a number of tokens above 0"),
        (["--dataset-tokens", "nan"], "expected a number of tokens above 0"),
        (["--json", "/no/such/place/plan.json"], "/no/such/place is no directory"),
    ],
)
def test_flags_are_refused_before_anything_is_compiled(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topology, "missing", lambda: "the compiler was asked for")
    assert command.main(["plan", str(CONFIGS / "30b-v6e-8x8.yaml"), "--topology", "v6e:8x8", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(33.82G) exceeds available HBM (31.24G). HLO module: jit_train_step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)


def test_a_step_the_compiler_cannot_fit_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = step_config(tmp_path, {"fsdp": 2, "expert": 2})

    class Lowered:
        def lower(self, *_: Any) -> Lowered:
            return self

        def compile(self) -> Any:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(aot, "make_train_step", lambda *_, **__: Lowered())
    monkeypatch.setattr(topology, "prepare_environment", lambda: None)
    monkeypatch.setattr(plan, "open_devices", lambda _: jax.devices()[:4])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    arguments = ["plan", str(tmp_path / "config.yaml"), "--topology", "v6e:2x2"]
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == (
        "v6e:2x2: DOES NOT FIT: Ran out of memory on HBM, the total memory required for HLO temporaries (33.82G) exceeds "
        "available HBM (31.24G)\n"
    )
    assert command.main([*arguments, "--sweep", "--programs", "2"]) == 1
    out, err = capsys.readouterr()
    assert out.count("does not fit: Ran out of memory on HBM") == 2 and "none of these fits" in out and not err


def test_without_the_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(CONFIGS / "30b-v6e-8x8.yaml"), "--topology", "v6e:8x8"]
    monkeypatch.setattr(topology, "missing", lambda: "libtpu is not installed")
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "libtpu is not installed, expected Python 3.12 or later with libtpu" in err
    assert command.main(arguments[:2]) == 2
    assert "--topology" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    assert topology.missing() == "Python 3.11 is too old for the compiler"


def test_candidates_are_ranked_by_the_formula() -> None:
    config = load_config(CONFIGS / "30b-v6e-8x8.yaml", ["--model.path", str(CONFIGS / "qwen3-vl-30b-a3b")])
    ranked = plan.candidates(config, topology.Topology.parse("v6e:8x8"))
    assert [c.per_token for c in ranked] == sorted(c.per_token for c in ranked)
    assert {c.config.mesh.expert for c in ranked} == {1, 2, 4, 8, 16, 32, 64}
    assert {c.config.mesh.expert * c.config.mesh.fsdp for c in ranked} == {64}
    assert {c.config.backend.remat for c in ranked} == {"full", "dots"}
    assert {c.config.backend.dispatch for c in ranked} == {"allgather", "all_to_all"}
    # A device keeps what it sends to itself; all-to-all sends k rows a token, all-gather the token to each other device.
    rows = f"batch_rows={4 * config.data.batch_rows}"
    sent = {c.config.backend.dispatch: c for c in ranked if c.config.mesh.expert == 32 and rows in c.name}
    sent = {name: sum(t.bytes for t in wire.least(c.config, aot.model_config(c.config))) for name, c in sent.items()}
    assert sent["all_to_all"] < sent["allgather"]


def test_a_sweep_compares_what_programs_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second by the formula is the quickest once compiled; the third does not fit; the fourth cannot be quicker."""
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(CONFIGS / "30b-v5p-4x4x4.yaml")
    where = topology.Topology.parse("v5p:4x4x4")
    choices = {rows: dataclasses.replace(config, data=dataclasses.replace(config.data, batch_rows=rows)) for rows in (1, 2, 4, 8)}
    formula = {1: 1.0, 2: 2.0, 4: 3.0, 8: 4.0}
    compiled = {1: (9.0, True), 2: (3.5, True), 4: (3.2, False), 8: (4.0, True)}  # seconds per token, fits
    monkeypatch.setattr(plan, "candidates", lambda *_: [plan.Candidate(choices[rows], s) for rows, s in formula.items()])
    done: list[int] = []

    def make_plan(config: TrainConfig, _: Any) -> Any:
        rows = config.data.batch_rows
        done.append(rows)
        seconds, fits = compiled[rows]
        program = SimpleNamespace(memory={"peak": 1.0})
        estimate = roofline.Estimate(compute=1e-9, hbm=1e-9, ici_fast=1e-9, ici_slow=seconds * 10, model=1.0)
        return SimpleNamespace(config=config, roofline=estimate, tokens=10, program=program, fits=fits)

    monkeypatch.setattr(plan, "make_plan", make_plan)
    said: list[str] = []
    best = plan.sweep(config, where, programs=4, say=said.append)
    assert best is not None and best.config.data.batch_rows == 2
    assert done == [1, 2, 4]
    assert "9000000000.00 by what it sends" in said[1] and said[3].endswith("does not fit")
    assert plan.sweep(config, where, programs=0, say=said.append) is None and "none of these fits" in said[-1]


def test_a_sweep_does_not_compile_what_needs_more_than_what_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(CONFIGS / "30b-v6e-8x8.yaml")
    where = topology.Topology.parse("v6e:8x8")
    tried: list[TrainConfig] = []

    def make_plan(config: TrainConfig, _: Any) -> Any:
        tried.append(config)
        if config.data.batch_rows > 128:
            raise DoesNotFit("Ran out of memory on HBM")
        estimate = roofline.Estimate(compute=1e-9, hbm=1e-9, ici_fast=1e-9, ici_slow=1.0, model=1.0)
        return SimpleNamespace(
            config=config, roofline=estimate, tokens=10**9, program=SimpleNamespace(memory={"peak": 1.0}), fits=True
        )

    monkeypatch.setattr(plan, "make_plan", make_plan)
    best = plan.sweep(config, where, programs=4, say=lambda _: None)
    assert best is not None and best.config.data.batch_rows == 128
    failed = [c for c in tried if c.data.batch_rows > 128]
    assert len({c.mesh for c in failed}) == len(failed)  # `full` did not fit, so `dots` on the same mesh was not compiled
