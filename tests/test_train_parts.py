"""The parts of the program around the step: counting, FLOPs, metrics files, the reading thread, exact match, the plot."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.hf import param_shapes
from qvlmoe_jax.moe import RouterStats
from qvlmoe_jax.param_tree import nest
from tests import cases, hub_configs, tiny, training
from train.checkpoints import fingerprint
from train.config import MetricsConfig
from train.errors import TrainingError
from train.evaluate import answers
from train.feed import Counts, Feed, Interrupted, WholeBatches, count, decode_iterator, encode_iterator
from train.flops import forward_flops, peak_tflops, step_flops
from train.metrics import Metrics, read_metrics, router_load
from train.optim import split_frozen
from train.plot import plot


def test_counts_of_a_batch() -> None:
    rows = [[cases.Text(4), cases.Image(2, 3), cases.Text(2)], [cases.Video(2, 1, 2), cases.Text(3)]]
    batch = training.stacked([training.labelled(tiny.TINY, cases.build(tiny.TINY, rows))] * 2)
    lengths = [4 + 2 + 6 + 2, 2 * (2 + 2 + 2) + 3]
    assert count(batch) == Counts(
        tokens=2 * sum(lengths),
        slots=2 * 2 * 64,
        samples=4,
        token_pairs=2 * sum(n * (n + 1) // 2 for n in lengths),
        patches=2 * (24 + 8 + 8),
        patch_slots=batch.patch_segment_ids.size,
        frame_pairs=2 * (24**2 + 2 * 8**2),
    )
    assert count(batch) + count(batch) == Counts(*(2 * n for n in vars(count(batch)).values()))


def abstract_params(config: Qwen3VLMoeConfig) -> dict[str, Any]:
    return nest({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in param_shapes(config).items()})


def test_flops_of_the_released_models() -> None:
    """Published: 23.1 and 148.3 GFLOPs per token for a training step on text of length 4096 (forward and backward)."""
    counts = Counts(tokens=4096, slots=4096, samples=1, token_pairs=4096 * 4097 // 2)
    for released, expected in ((hub_configs.HUB_30B, 23.1e9), (hub_configs.HUB_235B, 148.3e9)):
        config = Qwen3VLMoeConfig.from_hf(released)
        per_token = step_flops(config, counts, abstract_params(config), {}) / 4096
        assert per_token == pytest.approx(expected, rel=0.02)


def test_flops_count_the_tower_and_what_is_frozen() -> None:
    config = Qwen3VLMoeConfig.from_hf(tiny.TINY)
    counts = Counts(tokens=10, slots=64, samples=1, token_pairs=55, patches=8, patch_slots=128, frame_pairs=64)
    forward = forward_flops(config, counts)
    # one patch: embedding 96 x 48, five blocks of 4 x 48 x 48 + 2 x 48 x 80; eight patches in one frame
    assert forward["vision"] == 2 * (8 * (96 * 48 + 5 * (4 * 48 * 48 + 2 * 48 * 80)) + 64 * 2 * 48 * 5)
    assert forward["merger"] == 2 * 2 * 4 * (192 * 192 + 192 * 64)
    assert forward["head"] == 2 * 10 * 64 * 256
    params = abstract_params(config)
    assert step_flops(config, counts, params, {}) == pytest.approx(3 * sum(forward.values()))
    trained, frozen = split_frozen(params, ["vision", "merger"])
    rest = forward["text"] + forward["head"]
    assert step_flops(config, counts, trained, frozen) == pytest.approx(forward["vision"] + forward["merger"] + 3 * rest)


def test_flops_follow_what_is_multiplied_not_what_is_stored() -> None:
    config = Qwen3VLMoeConfig.from_hf(tiny.TINY)
    counts = Counts(tokens=10, slots=64, samples=1, token_pairs=55)
    params, text = abstract_params(config), config.text_config
    whole = step_flops(config, counts, params, {})
    # A table that is looked up has no product; of the experts only the chosen ones have.
    assert step_flops(config, counts, *split_frozen(params, [".*embed_tokens/.*"])) == pytest.approx(whole)
    chosen = 2 * 10 * text.num_experts_per_tok * 3 * text.hidden_size * text.moe_intermediate_size
    chosen *= text.layer_kinds().count("moe")
    assert step_flops(config, counts, *split_frozen(params, ["experts"])) == pytest.approx(whole - chosen)
    # A tied head is the table: frozen, it needs no gradient.
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    params = {path: leaf for path, leaf in params.items() if path != "lm_head"}
    head = forward_flops(tied, counts)["head"]
    assert step_flops(tied, counts, params, {}) == pytest.approx(whole)
    assert step_flops(tied, counts, *split_frozen(params, [".*embed_tokens/.*"])) == pytest.approx(whole - head)


def test_flops_of_attention_do_not_depend_on_what_is_trained() -> None:
    """Both factors of its products are inputs: two passes backward, where a frozen weight costs one."""
    config = Qwen3VLMoeConfig.from_hf(tiny.TINY)
    one, more = (Counts(tokens=10, slots=64, samples=1, token_pairs=pairs) for pairs in (55, 155))
    params = abstract_params(config)
    frozen_layers = split_frozen(params, [".*language_model/layers/.*"])
    for trained, frozen in ((params, {}), frozen_layers):
        grown = step_flops(config, more, trained, frozen) - step_flops(config, one, trained, frozen)
        text = config.text_config
        assert grown == pytest.approx(3 * 100 * 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers)


def test_peaks_by_the_longest_name() -> None:
    assert peak_tflops("TPU v5 lite") == 197 and peak_tflops("TPU v5p") == 459
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("cpu") is None


def test_router_load() -> None:
    tokens = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]], np.float32)
    log_z = np.array([10, 20, 5], np.float32)
    stats: Any = RouterStats(tokens, np.zeros((3, 4)), log_z, np.full(3, 10.0))  # pyright: ignore[reportArgumentType]
    load = {"max_over_mean": [1.0, 4.0, 2.0], "entropy": [1.0, 0.0, 0.5], "dead": [0, 3, 2], "z_loss": [1.0, 2.0, 0.5]}
    assert router_load(stats) == load
    bias = np.array([[0.1, -0.2, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 0]])
    assert router_load(stats, bias) == {**load, "bias": [0.2, 0.0, 0.5]}


def test_metrics_lines_survive_kills_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, MetricsConfig(), {})
    for step in (1, 2, 3):
        metrics.write("train", step, {"loss": np.float32(step), "mfu": None, "router": {"dead": [0]}}, show=("loss", "mfu"))
    metrics.write("train", 4, {"loss": float("nan"), "router": {"z_loss": [float("nan"), 1.0]}})
    metrics.close()
    assert capsys.readouterr().out.splitlines()[0] == "train       1  loss 1"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0] == {"kind": "train", "step": 1, "loss": 1.0, "router": {"dead": [0]}} and lines[3]["loss"] == "nan"
    assert lines[3]["router"] == {"z_loss": ["nan", 1.0]}  # JSON has no NaN, and other readers refuse it
    Metrics(tmp_path, MetricsConfig(), {}, resume_step=2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("service", ["wandb", "mlflow", "tensorboard"])
def test_a_service_that_is_not_installed(tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"tensorboard": "tensorboardX"}.get(service, service)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(TrainingError, match=f"metrics.{service} needs the package {package}, .* pip install {package}"):
        Metrics(tmp_path, dataclasses.replace(MetricsConfig(), **{service: True}), {})  # pyright: ignore[reportArgumentType]


def test_a_metrics_line_that_nobody_wrote_is_named(tmp_path: Path) -> None:
    for line in (b"\0\0\0", b'{"step": 2', b"\xff"):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n' + line + b"\n")
        with pytest.raises(TrainingError, match="metrics.jsonl: line 2 is not JSON"):
            read_metrics(tmp_path)


def test_the_plot_is_drawn_from_the_file(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no metrics"):
        plot(tmp_path)
    metrics = Metrics(tmp_path, MetricsConfig(), {})
    load = {"max_over_mean": [1.5, 2.0], "entropy": [1, 1], "dead": [0, 0]}
    for step in range(1, 4):
        metrics.write("train", step, {"loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "accuracy": 0.1, "router": load})
    metrics.write("train", 4, {"loss": float("nan"), "router": {**load, "max_over_mean": [float("inf"), 2.0]}})
    metrics.write("validation", 3, {"validation_loss": 2.0, "token_accuracy": 0.5, "exact_match": 0.25})
    metrics.close()
    picture = plot(tmp_path)
    assert picture == tmp_path / "curves.png" and picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_the_feed_keeps_order_state_and_errors() -> None:
    batches = training.mixed_batches(tiny.TINY, 3)
    feed = Feed(WholeBatches(training.ListData(batches)))
    for number in range(5):
        fed = next(feed)
        assert np.array_equal(fed.batch.input_ids, batches[number % 3].input_ids)
        assert fed.state == {"0": {"position": number + 1}}  # of this batch, however far the thread has read
        assert fed.counts == count(batches[number % 3])
    feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]

    class Ending(training.ListData):
        def __next__(self) -> Any:
            if self.position == 2:
                raise TrainingError("too many bad records")
            return super().__next__()

    feed = Feed(WholeBatches(Ending(batches)))
    for _ in range(2):
        next(feed)
    for _ in range(2):
        with pytest.raises(TrainingError, match="too many bad records"):
            next(feed)
    feed.close()


def test_a_feed_whose_data_never_come_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    never, asked = threading.Event(), threading.Event()

    class Stuck(training.ListData):
        def __next__(self) -> Any:
            never.wait()
            return super().__next__()

    monkeypatch.setattr("train.feed.PATIENCE", 0.1)
    feed = Feed(WholeBatches(Stuck(training.mixed_batches(tiny.TINY, 1))), stop=asked.is_set)
    threading.Timer(0.3, asked.set).start()
    with pytest.raises(Interrupted):
        next(feed)
    feed.close()
    never.set()


def test_answers_are_right_only_as_a_whole() -> None:
    #       two answers of one document, the second wrong in one place; then an answer of one token, right
    targets = jnp.array([[-100, 5, 6, -100, 7, 8, 9, -100], [-100, 4, -100, -100, -100, -100, -100, -100], [-100] * 8])
    correct = jnp.array([[0, 1, 1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8], jnp.float32)
    count_, right = answers(targets, correct)
    assert (float(count_), float(right)) == (3, 2)


@pytest.mark.parametrize("state", [{"next": np.int64(7), "waiting": [1, 2]}, b"\x00\xff opaque"])
def test_iterator_states_pass_through_json(state: Any) -> None:
    back = decode_iterator(json.loads(json.dumps(encode_iterator(state))))
    assert back == state and type(back) is type(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_fingerprint_sees_every_bit(dtype: str) -> None:
    values = jnp.arange(6).reshape(2, 3).astype(dtype)
    plain = fingerprint({"a": {"b": values}})
    assert plain == fingerprint({"a": {"b": values + 0}})
    assert plain["a/b"][1:] == [[2, 3], dtype]
    raw = np.asarray(values).view(f"uint{values.dtype.itemsize * 8}")
    for index, bit in (((0, 0), 0), ((1, 2), 15), ((0, 1), raw.dtype.itemsize * 8 - 1), ((1, 0), 7)):
        flipped = raw.copy()
        flipped[index] ^= raw.dtype.type(1) << raw.dtype.type(bit)
        assert fingerprint({"a": {"b": jnp.asarray(flipped.view(values.dtype))}}) != plain
    assert fingerprint({"a": {"b": values[::-1]}})["a/b"][0] != plain["a/b"][0]
