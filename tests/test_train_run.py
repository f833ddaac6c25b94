"""A run's directory: one program at a time, nothing half made, and an end in time and in order."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvlmoe_jax import Batch
from qvlmoe_jax.errors import ConfigError
from tests import pod, tiny, training
from train import loop
from train.checkpoints import Checkpoints
from train.config import CheckpointConfig, TrainConfig, load_config
from train.errors import TrainingError
from train.feed import WholeBatches
from train.metrics import read_metrics
from train.run_files import only_writer, start_run

pytestmark = pytest.mark.usefixtures("compiled_once")
MODEL = tiny.variant(
    training.SMALL, text_config={"num_hidden_layers": 1}, vision_config={"depth": 1, "deepstack_visual_indexes": [0]}
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = training.write_model(tmp_path / "model", MODEL)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_one_program_per_run(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        with pytest.raises(TrainingError, match="is in use by another process"), only_writer(tmp_path / "run"):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_a_file_in_the_way_of_a_run_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"^run = .* cannot be made \(.*\), expected a new directory"), only_writer(run):
            pass


def test_what_cannot_run_or_be_written_here_is_said_before_the_first_step(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").touch()
    for wrong, error, words in (
        ({"profile": str(tmp_path / "file" / "trace")}, OSError, "Not a directory"),
        ({"backend": {"attention": "splash"}}, ConfigError, "splash is the TPU's kernel, and this is a cpu; expected auto"),
    ):
        config = training.make_config(tmp_path / "run", model, **wrong)
        with pytest.raises(error, match=words):
            loop.train(config, data=training.ListData([]))


def test_a_run_killed_while_it_made_its_files_starts_again(tmp_path: Path, model: Path) -> None:
    config = training.make_config(tmp_path / "run", model)
    run = Path(config.run)
    (run / "hf.partial").mkdir(parents=True)
    (run / "hf.partial" / "config.json").touch()  # cut short: the tokenizer never came
    (run / "config.yaml.partial").write_text("run: ")
    with pytest.raises(ConfigError, match="is not empty and no training run"):
        start_run(config)  # hf/ is made after config.yaml
    (run / "hf.partial" / "config.json").unlink()
    (run / "hf.partial").rmdir()
    assert start_run(config) == []
    assert load_config(run / "config.yaml") == config
    assert {path.name for path in (run / "hf").iterdir()} == {"config.json", "tokenizer.json"}

    (run / "hf").rename(run / "hf.partial")
    (run / "hf.partial" / "tokenizer.json").unlink()
    assert start_run(config) == []
    assert {path.name for path in run.iterdir()} == {"config.yaml", "hf"}
    assert {path.name for path in (run / "hf").iterdir()} == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize("exported", [False, True])
def test_what_a_killed_export_left_does_not_stop_the_run(tmp_path: Path, model: Path, exported: bool) -> None:
    config = training.make_config(tmp_path / "run", model)
    run = Path(config.run)
    run.mkdir()
    start_run(config)
    for name in ("export.exporting", "export.replaced", *(["export"] if exported else [])):
        (run / name).mkdir()
        (run / name / "from").write_text(name)
    start_run(config)
    assert {path.name for path in run.iterdir()} == {"config.yaml", "hf", "export"}
    assert (run / "export" / "from").read_text() == ("export" if exported else "export.replaced")


class ClosingData(training.ListData):
    """Counts how often it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.soak
def test_a_run_ends_its_data_hears_sigterm_in_validation_and_keeps_its_config_when_it_refuses_another(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = training.mixed_batches(MODEL, 1)
    opened: list[ClosingData] = []

    def open_data(*_: Any) -> WholeBatches:
        opened.append(ClosingData(batches))
        return WholeBatches(opened[-1])

    def endless() -> Iterator[Batch]:
        for number in itertools.count():
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batches[0]

    monkeypatch.setattr(loop, "open_data", open_data)
    section = {"every": 2, "data": {"sources": [{"path": "unused.jsonl"}]}}
    config = training.make_config(tmp_path / "run", model, steps=3, validation=section)
    before = signal.getsignal(signal.SIGTERM)
    state = loop.train(config, validation=endless)
    assert int(state.step) == 2 and signal.getsignal(signal.SIGTERM) is before
    assert [data.closed for data in opened] == [1]
    assert [path.name for path in (Path(config.run) / "checkpoints").iterdir()] == ["2"]

    other = training.make_config(tmp_path / "run", model, steps=3, optimizer={"name": "lion"})
    with pytest.raises(TrainingError, match="use another run directory for a changed config"):
        loop.train(other)
    assert load_config(Path(config.run) / "config.yaml") == config


@pytest.mark.slow
def test_bad_steps_are_counted_between_the_lines(tmp_path: Path, model: Path) -> None:
    changes: dict[str, Any] = {"optimizer": {"learning_rate": 1e30, "clip_norm": None}, "metrics": {"every": 1000}}
    config = training.make_config(tmp_path / "run", model, steps=1000, max_bad_steps=2, **changes)
    with pytest.raises(TrainingError, match=r"^2 steps in a row had .* around step [3-9]$"):
        loop.train(config, data=training.ListData(training.mixed_batches(MODEL, 4)))


def test_a_killed_run_has_the_lines_of_an_undisturbed_one(tmp_path: Path, model: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every": 2, "keep": 3}, "metrics": {"every": 5}}
    config = training.make_config(tmp_path / "run", model, **changes)

    def lines() -> list[tuple[int, float]]:
        loop.train(config, data=training.ListData(training.mixed_batches(MODEL, 3)))
        return [(line["step"], line["tokens"]) for line in read_metrics(config.run)]

    undisturbed = lines()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")  # as if it had been killed before this one was written
    assert lines() == undisturbed
    assert [step for step, _ in undisturbed] == [2, 4, 5, 6]


def test_mfu_is_of_the_devices_that_the_run_uses(tmp_path: Path, model: Path) -> None:
    for mesh, used in (({}, 1), ({"fsdp": 2}, 2)):
        config = training.make_config(tmp_path / "run", model, mesh=mesh, metrics={"peak_tflops": 3.0})
        assert loop._peak_flops(config, loop.open_mesh(config)) == used * 3e12
    assert loop._peak_flops(training.make_config(tmp_path / "run", model), None) is None  # of a CPU


def test_an_interval_without_a_target_token_has_its_figures() -> None:
    figures = dict.fromkeys(("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "bad_steps", "bad_in_a_row"), 0.0)
    empty = {**figures, "tokens": 0.0, "accuracy": 0.0, "router_z_loss": None, "router": None, "router_bias": None}
    values = loop.Interval(metrics=[empty, {**empty, "aux_loss": 2.0}]).summary(0.0, lambda counts: 0.0, None)
    assert (values["tokens"], values["loss"], values["aux_loss"]) == (0.0, 0.0, 1.0)
    weighted = loop.Interval(metrics=[empty, {**empty, "aux_loss": 2.0, "tokens": 5.0}]).summary(0.0, lambda counts: 0.0, None)
    assert (weighted["tokens"], weighted["aux_loss"]) == (5.0, 2.0)


@pytest.fixture
def short(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of 50 steps with data for some 12: one epoch of 41 records, number 41 a bad one. Arguments change it."""
    data = {"epochs": 1, "accumulation": 1, "shuffle": False, "lookahead": 0, "prefetch": 0}
    changes: dict[str, Any] = {"mesh": {"fsdp": 1, "expert": 1}, "checkpoint": {"every": 0}, "metrics": {"every": 1000}}
    file = pod.write_run(tmp_path, steps=50, records=40, data=data, **changes)
    return lambda *arguments: load_config(file, arguments)


def saved(config: TrainConfig) -> list[int]:
    return Checkpoints(config.run, CheckpointConfig()).steps()


@pytest.mark.soak
def test_data_that_end_early_cost_no_step(short: Callable[..., TrainConfig]) -> None:
    with pytest.raises(TrainingError) as error:
        loop.train(short())
    (done,) = saved(short())
    kept = f"saved step {done} of 50 in {Path(short().run) / 'checkpoints' / str(done)}"
    assert 0 < done < 25 and str(error.value) == (
        f"the data ended after {done} of 50 steps; {kept}, and the same command with data.epochs above 1 goes on from there; "
        f"lower steps to {done} to end the run there"
    )
    with pytest.raises(TrainingError, match=f"the data ended after {done} of 50 steps; saved step {done} of 50"):
        loop.train(short())  # nothing is left, and nothing is lost
    with pytest.raises(TrainingError, match="data.epochs above 2"):
        loop.train(short("--data.epochs", "2"))
    assert saved(short()) == [done, 2 * done]  # the second epoch alone, in batches like the first's
    assert [line["step"] for line in read_metrics(short().run)] == [done, 2 * done]
    assert int(loop.train(short("--data.epochs", "2", "--steps", str(2 * done))).step) == 2 * done


@pytest.mark.soak
def test_data_that_fail_cost_no_step(short: Callable[..., TrainConfig], caplog: pytest.LogCaptureFixture) -> None:
    strict = short("--data.max_bad_records", "0")
    with pytest.raises(TrainingError, match="^1 bad records, more than max_bad_records = 0"):
        loop.train(strict)
    (done,) = saved(strict)
    assert f"the data failed: saved step {done} of 50 in {strict.run}/checkpoints/{done}; the same command" in caplog.text
    state = loop.train(short("--data.max_bad_records", "1", "--steps", str(done + 1)))
    assert int(state.step) == done + 1


@pytest.mark.soak
def test_batches_given_that_end_early_are_promised_nothing(tmp_path: Path, model: Path) -> None:
    none: Any = iter(())
    two: Any = iter(training.mixed_batches(MODEL, 2))
    config = training.make_config(tmp_path / "run", model)
    with pytest.raises(TrainingError, match="the data ended before the first step, expected at least one batch"):
        loop.train(config, data=none)
    with pytest.raises(TrainingError, match="the data ended after 2 of 6 steps; saved step 2 of 6 in .*/2; lower steps to 2"):
        loop.train(config, data=two)
    assert saved(config) == [2]
