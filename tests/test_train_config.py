"""The config: what YAML and the command line may say, and what is refused in which words."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qvlmoe_jax.errors import ConfigError
from train.config import OptimizerConfig, ScheduleConfig, TrainConfig, dump_config, load_config
from train.optim import PARTS, schedule, split_frozen

MINIMAL = """
run: out
steps: 100
model: {path: somewhere}
data: {sources: [{path: a.jsonl}]}
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> TrainConfig:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, overrides)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL + "optimizer: {learning_rate: 1e-4, name: lion}\nloss: {aux_loss: 1}\n",
        *("--steps", "5", "--schedule.name=wsd", "--schedule.decay_steps", "3", "--model.freeze", "[vision, router]"),
        *("--data.sources.0.path", "b.jsonl", "--optimizer.clip_norm", "null", "--seed", "1e3"),
    )
    assert config.optimizer == OptimizerConfig(name="lion", learning_rate=1e-4, clip_norm=None)
    assert config.loss.aux_loss == 1.0 and isinstance(config.loss.aux_loss, float)
    assert (config.steps, config.seed) == (5, 1000) and isinstance(config.seed, int)
    assert config.schedule == ScheduleConfig(name="wsd", decay_steps=3)
    assert config.model.freeze == ("vision", "router")
    assert config.data.sources[0].path == "b.jsonl"
    assert config.validation is None


def test_a_saved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "--validation.data.sources", "[{path: v.jsonl}]", "--optimizer.eps", "1e-30")
    assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimiser.name", "lion"], "unknown key 'optimiser', did you mean 'optimizer'?"),
        (["--optimizer.learning_rat", "1"], "unknown key 'optimizer.learning_rat', did you mean 'learning_rate'?"),
        (["--data.sources.0.pth", "x"], "unknown key 'data.sources.0.pth', did you mean 'path'?"),
        (["--zzzzqqq", "1"], "unknown key 'zzzzqqq', expected one of backend, checkpoint"),
        (["--optimizer.learning_rate", "fast"], "optimizer.learning_rate is 'fast', expected a number"),
        (["--optimizer.name", "sgd"], "optimizer.name is 'sgd', expected one of adamw, adafactor, lion, muon"),
        (["--steps", "1.5"], "steps is 1.5, expected a whole number"),
        (["--steps", "true"], "steps is True, expected a whole number"),
        (["--steps", "0"], "steps = 0, expected more than 0"),
        (["--model.from_scratch", "1"], "model.from_scratch is 1, expected true or false"),
        (["--optimizer.weight_decay=-1"], "optimizer: weight_decay = -1.0, expected 0 or more"),
        (["--optimizer", "7"], "optimizer is 7, expected a mapping of OptimizerConfig's keys"),
        (["--model.freeze", "vision"], "model.freeze is 'vision', expected a list"),
        (["--model.path", "null"], "model.path is None, expected a string"),
        (["--model", "{from_scratch: true}"], "model.path is missing, expected a value"),
        (["--schedule.name", "wsd"], "schedule: schedule wsd needs decay_steps"),
        (["--schedule.decay_steps", "5"], "schedule: decay_steps = 5 is wsd's, and the schedule is cosine; expected null"),
        (["--data.lookahead", "1000000000000000000000"], "data: lookahead = 1000000000000000000000, expected at most 4096"),
        (["--schedule.warmup_steps", "101"], "warmup_steps + decay_steps = 101 is more than steps = 100"),
        (["--backend.remat", "some"], "backend.remat is 'some', expected one of none, full, dots"),
        (["--checkpoint.best", "1"], "checkpoint.best is set, but nothing tells which is best; expected a validation section"),
        (["--checkpoint.best_metric", "accuracy"], "expected one of validation_loss, token_accuracy, exact_match"),
        (
            ["--validation", "{data: {sources: [{path: a.jsonl, weight: 1}]}}"],
            "validation: batches is null, one epoch, but a mixture with weights has no end",
        ),
        (["--mesh.fsdp", "0"], "mesh: fsdp = 0, expected more than 0"),
        (["--data.sources.3.path", "x"], "'3' is no position of a list of 1"),
        (["--steps.more", "1"], "--steps.more: steps is 100 and holds no keys"),
        (["--steps"], "--steps has no value"),
        (["steps", "3"], "'steps' on the command line, expected --dotted.key value"),
        (["--steps", "[1"], "--steps: not YAML"),
        (
            ["--run", "2024-13-45"],
            "--run: holds a value that YAML takes for a date, a number or a tag but cannot read (month",
        ),
        (["--run", "!!bool x"], "but cannot read ('x'); expected text such as '2024-13-45' in quotes"),
        (["--run", "!!timestamp x"], "--run: holds a value that YAML takes for a date"),
        (["--run", "[" * 3000], "--run: nested too deeply"),
        (["--steps", "1" * 400], "expected a whole number"),
        (["--seed", "18446744073709551616"], "seed = 18446744073709551616, expected 0 .. 2^63 - 1"),
        (["--seed", "-1"], "seed = -1, expected 0 .. 2^63 - 1"),
        (["--optimizer.b1", "1"], "optimizer: b1 = 1.0, expected at least 0 and less than 1"),
        (["--optimizer.b2=-0.1"], "optimizer: b2 = -0.1, expected at least 0 and less than 1"),
        (["--optimizer.b2", "nan"], "optimizer: b2 = nan, expected at least 0 and less than 1"),
        (["--schedule.final_fraction", "1.5"], "schedule: final_fraction = 1.5, expected at most 1"),
        (["--optimizer.learning_rate", ".inf"], "optimizer: learning_rate = inf, expected a finite number"),
        (["--optimizer.learning_rate", ".nan"], "optimizer: learning_rate = nan, expected 0 or more"),
        (["--optimizer.clip_norm", "inf"], "optimizer: clip_norm = inf, expected a finite number"),
        (["--loss.z_loss", ".inf"], "loss: z_loss = inf, expected a finite number"),
        (["--router.bias_update_rate", ".inf"], "router: bias_update_rate = inf, expected a finite number"),
        (["--metrics.peak_tflops", ".inf"], "metrics: peak_tflops = inf, expected a finite number"),
        (["--lora.alpha", ".inf"], "lora: rank = 16, alpha = inf, expected finite numbers more than 0"),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MINIMAL, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("[1]", "holds list"), ("a: b: c", "not YAML"), ("", "run is missing")])
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(f"{MINIMAL}# caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: not UTF-8 at byte \d+ \(.*\); save it as UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_the_command_leaves_loggers_as_they_were() -> None:
    from train.__main__ import main

    absl = logging.getLogger("absl")
    before = absl.level
    assert main(["plot"]) == 2 and absl.level == before


def test_the_command_refuses_in_one_line_without_jax(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(MINIMAL)
    code = "import sys, train.__main__ as t; code = t.main(sys.argv[1:]); print(code, 'jax' in sys.modules)"
    for arguments, status in (
        (["config.yaml", "--stesp", "3"], 2),
        (["--help"], 0),
        (["none.yaml"], 2),
        (["plot"], 2),
        (["plot", "x"], 2),
    ):
        run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); {code}", *arguments]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines()[-1] == f"{status} False", done.stderr
        assert len(done.stderr.splitlines()) == (1 if status else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def rates(config: ScheduleConfig, steps: int) -> list[float]:
    rate = schedule(config, 2.0, steps)
    return [float(rate(jnp.int32(i))) for i in range(steps)]


def test_schedules() -> None:
    assert rates(ScheduleConfig(name="constant", warmup_steps=2), 4) == [1, 2, 2, 2]
    assert rates(ScheduleConfig(name="linear", final_fraction=0.5), 4) == [2, 1.75, 1.5, 1.25]
    assert rates(ScheduleConfig(name="wsd", warmup_steps=1, decay_steps=2), 5) == [2, 2, 2, 2, 1]
    cosine = rates(ScheduleConfig(name="cosine", warmup_steps=2, final_fraction=0.1), 12)
    assert cosine[:3] == pytest.approx([1, 2, 2])
    assert cosine[7] == pytest.approx(2 * (0.1 + 0.9 / 2))  # half way
    assert all(a > b for a, b in itertools.pairwise(cosine[2:])) and cosine[-1] > 0.2


def test_decays_end_one_step_after_the_last_as_in_optax() -> None:
    steps = range(11)  # the run has 0 .. 9
    for config, same in (
        (ScheduleConfig("linear", final_fraction=0.1), optax.linear_schedule(2.0, 0.2, 10)),
        (ScheduleConfig("cosine", final_fraction=0.1), optax.cosine_decay_schedule(2.0, 10, alpha=0.1)),
        (ScheduleConfig("wsd", decay_steps=4, final_fraction=0.1), optax.linear_schedule(2.0, 0.2, 4, transition_begin=6)),
    ):
        rate = schedule(config, 2.0, 10)
        assert [float(rate(jnp.int32(i))) for i in steps] == pytest.approx([np.asarray(same(i)).item() for i in steps], abs=1e-6)
        assert float(rate(jnp.int32(9))) > float(rate(jnp.int32(10))) == pytest.approx(0.2)


def tree() -> dict[str, Any]:
    from qvlmoe_jax import Qwen3VLMoeConfig
    from qvlmoe_jax.hf import param_shapes
    from qvlmoe_jax.param_tree import nest
    from tests import tiny

    return nest(dict(param_shapes(Qwen3VLMoeConfig.from_hf(tiny.TINY))))


def test_freezing_by_name_covers_the_tree() -> None:
    from qvlmoe_jax.param_tree import flatten

    everything = set(flatten(tree()))
    parts = {}
    for name in PARTS:
        trained, frozen = split_frozen(tree(), [name])
        parts[name] = set(flatten(frozen))
        assert set(flatten(trained)) | parts[name] == everything and not set(flatten(trained)) & parts[name]
    assert parts["vision"] | parts["merger"] | parts["text"] == everything
    assert not parts["vision"] & parts["merger"] and not parts["text"] & (parts["vision"] | parts["merger"])
    assert parts["experts"] | parts["router"] | parts["embeddings"] < parts["text"]
    assert all("gate_proj" not in path for path in parts["router"])


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["visoin"], "'visoin' matches no parameter, expected one of vision, merger"),
        (["("], "not a regular expression"),
        (["text", "vision", "merger"], "leaves no parameter to train"),
    ],
)
def test_freezing_that_cannot_be_meant(freeze: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_frozen(tree(), freeze)
