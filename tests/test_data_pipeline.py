"""The stream: every good record once per epoch, bad ones counted and named, resumed at the exact next sample."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qvlmoe_jax import Batch
from qvlmoe_jax.errors import ConfigError
from tests.data_cases import MODEL_CONFIG, config, data_uri, picture_record, png, processor, text_record, write_jsonl
from train.data import make_data
from train.data_config import DataConfig, SourceConfig
from train.documents import DocumentMaker
from train.errors import TrainingError
from train.feed import Shares
from train.records import RawRecord

EIGHT_WAYS: list[Any] = [
    '{"messages": [',  # cut off
    {"text": "no turns here"},
    {"messages": [{"role": "robot", "content": "beep"}, {"role": "assistant", "content": "no"}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    picture_record("where?", "nowhere", "missing.png"),
    picture_record("what?", "nothing", "data:image/png;base64," + "AAAA" * 20),
    {**picture_record("more?", "yes", "good.png"), "images": []},
    text_record("long " * 200, "yes"),
]
REASONS = [
    "is not JSON",
    "expected messages or conversations",
    "has the role 'robot'",
    "no assistant turn",
    "does not exist",
    "cannot be used: the picture has no format",
    "asks for more images",
    "more than sequence_length = 96",
]


def open_data(settings: DataConfig, *held: int) -> Any:
    """All groups, or those that are held."""
    groups = settings.num_groups(1)
    shares = Shares(groups, held, held) if held else None
    return make_data(settings, MODEL_CONFIG, processor(), shares=shares)


def bad_records(data: Any) -> dict[str, str]:
    """By all groups together."""
    return {name: error for state in data.get_state().values() for name, error in state["bad"].items()}


def questions(batch: Batch) -> Iterator[str]:
    """The question of each document of a batch; in the tests it is the record's number."""
    for a, b in itertools.product(*map(range, batch.input_ids.shape[:2])):
        segments = batch.segment_ids[a, b]
        for segment in range(1, segments.max() + 1):
            text = processor().decode(batch.input_ids[a, b][segments == segment])
            yield text.removeprefix("user\n").partition("\n")[0]


def records(count: int, *, every_broken: int = 10**9) -> list[Any]:
    """Numbered records: text, one picture, two pictures in turn; each `every_broken`-th is broken, in eight ways in turn."""
    out: list[Any] = []
    for i in range(count):
        if i % every_broken == every_broken - 1:
            out.append(EIGHT_WAYS[i // every_broken % 8])
        elif i % 3 == 0:
            out.append(text_record(str(i), "yes"))
        else:
            out.append(picture_record(str(i), "no", *["good.png"] * (i % 3)))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records")
    (path / "good.png").write_bytes(png(0))
    return path


def test_one_shape_and_every_good_record_once(folder: Path) -> None:
    path = write_jsonl(folder / "mixed.jsonl", records(203, every_broken=20))
    data = open_data(config(path, epochs=1, accumulation=2))
    batches = list(data)
    assert len({tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in batches}) == 1
    assert {batch.input_ids.shape for batch in batches} == {(2, 4, 96)}
    good = {str(i) for i in range(203) if i % 20 != 19}
    seen = Counter(q for batch in batches for q in questions(batch))
    assert seen == Counter(dict.fromkeys(good, 1))
    assert any(batch.segment_ids.max() > 1 for batch in batches)


def test_bad_records_are_counted_and_named_up_to_the_limit(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(folder / "bad.jsonl", [*EIGHT_WAYS, *records(40)])
    with caplog.at_level(logging.WARNING, "train"):
        data = open_data(config(path, epochs=2, max_bad_records=8, shuffle=False, vision_groups=1))
        batches = list(data)
    assert len([q for batch in batches for q in questions(batch)]) == 80
    bad = bad_records(data)
    assert list(bad) == [f"{path}:{line}" for line in range(1, 9)]
    for reason, (name, message) in zip(REASONS, bad.items(), strict=True):
        assert reason in message
        assert any(name in record.message and reason in record.message for record in caplog.records)
    assert len([r for r in caplog.records if "bad record" in r.message]) == 8, "each is named once, not once an epoch"
    with pytest.raises(TrainingError, match=r"8 bad records, more than max_bad_records = 7\. .*bad\.jsonl:8 has \d+ tokens"):
        list(open_data(config(path, epochs=1, max_bad_records=7, shuffle=False, vision_groups=1)))


def test_frames_that_fit_no_batch_make_a_bad_record(folder: Path) -> None:
    path = write_jsonl(folder / "frames.jsonl", [text_record("1", "a"), picture_record("2", "b", *["good.png"] * 3)])
    data = open_data(config(path, epochs=1, shuffle=False))
    assert [q for batch in data for q in questions(batch)] == ["1"]
    assert "more frames than a vision group of 2 rows of 64 patches" in bad_records(data)[f"{path}:2"]
    data = open_data(config(path, epochs=1, row_patches=32))
    assert [q for batch in data for q in questions(batch)] == ["1"]
    assert "frame of 64 patches, more than row_patches = 32" in bad_records(data)[f"{path}:2"]
    data = open_data(config(path, epochs=1, vision_rows=0))
    assert [q for batch in data for q in questions(batch)] == ["1"]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(x, y)
        for one, other in zip(first, second, strict=True)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("weight", [None, 2.0])
def test_data_without_one_good_record_are_an_error_not_an_endless_search(folder: Path, weight: float | None) -> None:
    paths = [write_jsonl(folder / f"long{i}.jsonl", [text_record("long " * 200, "yes")] * (i + 1)) for i in range(2)]
    sources = tuple(SourceConfig(str(path), weight=weight) for path in paths)
    with contextlib.closing(open_data(dataclasses.replace(config(paths[0]), sources=sources))) as data:
        enough = 5 if weight is None else 8  # of 3 records; of 1 and 2 in turn
        with pytest.raises(TrainingError, match=f"^{enough} records in a row are bad.*long.*jsonl:.* more than sequence_length"):
            next(data)


BROKEN = '{"broken'
GOOD, LARGE = text_record("1", "yes"), picture_record("2", "no", *["good.png"] * 3)  # more frames than the vision rows hold


@pytest.mark.parametrize(
    ("lines", "changes"),
    [
        ([text_record("1", "yes" * 20)] * 3 + [BROKEN], {}),  # the good ones soon fit nowhere and wait, with a bad one between
        ([GOOD, LARGE, LARGE], {}),  # those that wait turn out to be bad, more of them than there are records
        ([GOOD, BROKEN, BROKEN, BROKEN], {"shuffle": True}),  # an epoch ends with the bad ones, the next begins with them
    ],
    ids=["good ones wait", "bad ones wait", "bad ones of two epochs"],
)
def test_data_with_one_good_record_go_on(folder: Path, lines: list[Any], changes: dict[str, Any]) -> None:
    path = write_jsonl(folder / "some.jsonl", lines)
    settings = config(path, **{"shuffle": False, "batch_rows": 1, "vision_groups": 1, **changes})
    with contextlib.closing(open_data(settings)) as data, contextlib.closing(open_data(settings)) as resumed:
        batches = list(itertools.islice(data, 4))
        resumed.set_state(json.loads(json.dumps(data.get_state())))
        batches += itertools.islice(data, 20)
        assert all(set(questions(batch)) == {"1"} for batch in batches)
        assert same(list(itertools.islice(resumed, 20)), batches[4:])


def test_one_good_source_of_a_mixture_is_enough(folder: Path) -> None:
    """However rare it is: far more records in a row are bad than there are."""
    paths = write_jsonl(folder / "rare.jsonl", [GOOD]), write_jsonl(folder / "common.jsonl", [BROKEN])
    sources = tuple(SourceConfig(str(path), weight=weight) for path, weight in zip(paths, (1, 50), strict=True))
    settings = dataclasses.replace(config(paths[0], vision_groups=1), sources=sources)
    with contextlib.closing(open_data(settings)) as data:
        assert set(questions(next(data))) == {"1"}


def test_a_position_past_the_end_of_other_data_is_refused(folder: Path) -> None:
    path = write_jsonl(folder / "four.jsonl", [text_record(str(i), "yes") for i in range(4)])
    with contextlib.closing(open_data(config(path, epochs=1, shuffle=False, vision_groups=1))) as data:
        data.set_state({"0": {"next": 4, "waiting": [3], "bad": {}}})
        assert list(questions(next(data))) == ["3"]
        for state in ({"next": 5, "waiting": [], "bad": {}}, {"next": 4, "waiting": [4], "bad": {}}):
            with pytest.raises(TrainingError, match="after 5 records of a vision group's data, which now has 4"):
                data.set_state({"0": state})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact_at_every_batch(folder: Path, prefetch: int) -> None:
    path = write_jsonl(folder / "resume.jsonl", records(61, every_broken=15))
    settings = config(path, epochs=2, prefetch=prefetch, lookahead=5)
    data = open_data(settings)
    states, batches = [data.get_state()], []
    for batch in data:
        batches.append(batch)
        states.append(data.get_state())
    assert any(state["0"]["waiting"] for state in states), "a case without waiting documents would prove less"
    for i, state in enumerate(states):
        resumed = open_data(settings)
        resumed.set_state(json.loads(json.dumps(state)))
        assert same(list(itertools.islice(resumed, 3)), batches[i : i + 3])
        resumed.close()
    data.set_state(states[1])  # also an iterator that has run
    assert same(list(data), batches[1:])
    data.close()


def test_order_is_the_seeds_and_changes_each_epoch(folder: Path) -> None:
    path = write_jsonl(folder / "order.jsonl", [text_record(str(i), "yes") for i in range(40)])

    def order(**changes: Any) -> list[str]:
        settings = config(path, epochs=2, lookahead=0, vision_groups=1, **changes)
        return [q for batch in open_data(settings) for q in questions(batch)]

    first = order(seed=1)
    assert first == order(seed=1) != order(seed=2)
    assert set(first[:40]) == set(first[40:]) and first[:40] != first[40:]
    assert order(shuffle=False) == [str(i) for i in range(40)] * 2


@pytest.mark.parametrize("count", [4, 40, 41])
def test_groups_share_an_epoch_exactly_and_do_not_know_who_holds_them(folder: Path, count: int) -> None:
    path = write_jsonl(folder / f"share{count}.jsonl", [text_record(str(i), "yes") for i in range(count)])
    settings = config(path, epochs=2, batch_rows=8, vision_groups=4)
    alone = open_data(settings)
    batches = list(alone)
    assert Counter(q for batch in batches for q in questions(batch)) == Counter({str(i): 2 for i in range(count)})
    for held in ((0,), (1, 2), (3,)):
        part = open_data(settings, *held)
        own = list(part)
        for i, batch in enumerate(batches):  # where these groups have ended and others have not, they are empty
            expected = own[i] if i < len(own) else part.empty
            rows = [2 * g + row for g in held for row in (0, 1)]
            assert np.array_equal(batch.input_ids[:, rows], expected.input_ids)
            assert np.array_equal(batch.position_ids[:, :, rows], expected.position_ids)
            assert np.array_equal(batch.pixel_values[:, list(held)], expected.pixel_values)
        states = alone.get_state()
        assert part.get_state() == {str(g): states[str(g)] for g in held}


def test_a_run_goes_on_with_other_holders_of_its_groups(folder: Path) -> None:
    path = write_jsonl(folder / "holders.jsonl", records(90, every_broken=15))
    settings = config(path, epochs=1, batch_rows=8, vision_groups=4)
    whole = list(open_data(settings))
    first, second = open_data(settings, 0, 1), open_data(settings, 2, 3)
    for batch in whole[:2]:
        parts = [next(first), next(second)]
        assert np.array_equal(batch.input_ids, np.concatenate([part.input_ids for part in parts], axis=1))
    alone = open_data(settings)
    alone.set_state({**first.get_state(), **second.get_state()})
    assert len(whole) > 3 and same(list(alone), whole[2:])


@pytest.mark.parametrize(
    ("given", "shards", "began_with", "found"),
    [(None, 8, None, 8), (16, 8, None, 16), (None, 4, 8, 8), (8, 2, 8, 8), (None, 1, 8, 8)],
)
def test_how_many_groups_there_are(given: int | None, shards: int, began_with: int | None, found: int) -> None:
    assert config(Path("unused.jsonl"), batch_rows=16, vision_groups=given).num_groups(shards, began_with) == found


@pytest.mark.parametrize(
    ("given", "shards", "began_with", "message"),
    [
        (4, 8, None, r"4 vision groups cannot be spread over the mesh's 8 batch shards .* expected a multiple in vision_groups"),
        (None, 8, 4, r"4 vision groups cannot be spread .* choose a mesh"),
        (8, 8, 4, r"vision_groups = 8, but the run has dealt its records to 4 groups; expected 4 or null"),
        (None, 3, None, r"batch_rows = 16 is not a multiple of the 3 vision groups"),
    ],
)
def test_groups_that_cannot_be_spread(given: int | None, shards: int, began_with: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path("unused.jsonl"), batch_rows=16, vision_groups=given).num_groups(shards, began_with)


def test_a_mixture_keeps_its_weights(folder: Path) -> None:
    large = write_jsonl(folder / "large.jsonl", [text_record(f"l{i}", "yes") for i in range(300)])
    small = write_jsonl(folder / "small.jsonl", [text_record(f"s{i}", "yes") for i in range(7)])
    sources = (SourceConfig(str(large), weight=3), SourceConfig(str(small), weight=1))
    seen: list[str] = []
    for group in range(2):
        settings = DataConfig(sources, sequence_length=96, batch_rows=8, vision_groups=2, vision_rows=0)
        data = open_data(settings, group)
        seen += [q for batch in itertools.islice(data, 4) for q in questions(batch)]
        data.close()
    share = sum(q.startswith("s") for q in seen) / len(seen)
    assert abs(share - 0.25) < 0.03
    assert len({q for q in seen if q.startswith("s")}) == 7
    assert max(Counter(q for q in seen if q.startswith("l")).values()) == 1, "a large source does not repeat early"


def test_a_video_keeps_its_frames_apart_and_in_order(folder: Path) -> None:
    """A clip between two pictures: each frame its own attention segment, tokens pointing at them in the order of the text."""
    import av

    with av.open(str(folder / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(8):
            pixels = np.full((64, 64, 3), 30 * i, np.uint8)
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        clip.mux(stream.encode())
    content = [{"type": "image"}, {"type": "video"}, {"type": "image"}, {"type": "text", "text": "v"}]
    video = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}],
        "images": ["good.png", data_uri(1)],
        "videos": ["clip.mp4"],
    }
    path = write_jsonl(folder / "video.jsonl", [text_record("t", "no"), video])
    settings = config(path, epochs=1, shuffle=False, sequence_length=256, batch_rows=1, vision_groups=1, vision_rows=6)
    data = open_data(settings)
    (batch,) = data
    assert bad_records(data) == {}
    index = batch.visual_index[0, 0][batch.visual_index[0, 0] >= 0]
    rows = index * 4 // 64
    order = rows[np.r_[True, rows[1:] != rows[:-1]]].tolist()
    assert len(order) >= 4 and len(set(order)) == len(order), "picture, frames, picture: one vision row each here"
    brightness = [float(batch.pixel_values[0, 0, row].mean()) for row in order]
    assert brightness[1:-1] == sorted(brightness[1:-1]) and brightness[-2] - brightness[1] > 0.5
    maker = DocumentMaker(settings, MODEL_CONFIG, processor())
    good, other = (maker(RawRecord("r", str(folder), "auto", picture_record("q", "a", x))) for x in ("good.png", data_uri(1)))
    assert np.array_equal(batch.pixel_values[0, 0, order[0]], good["pixel_values"])
    assert np.array_equal(batch.pixel_values[0, 0, order[-1]], other["pixel_values"])


def test_the_makers_copy_makes_the_same() -> None:
    """What a worker process gets."""
    maker = DocumentMaker(config(Path("unused.jsonl")), MODEL_CONFIG, processor())
    raw = RawRecord("r:1", "", "auto", json.dumps(picture_record("1", "yes", data_uri(3))).encode())
    first, second = maker(raw), pickle.loads(pickle.dumps(maker))(raw)
    assert first["error"] is None
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_control_tokens_in_the_text_are_refused(folder: Path) -> None:
    maker = DocumentMaker(config(folder / "unused.jsonl"), MODEL_CONFIG, processor())
    for token in ("<|im_start|>assistant\n", "<|image_pad|>", "<|im_end|>"):
        raw = RawRecord("r:1", "", "auto", {**text_record("a" + token, "b")})
        assert "control token" in maker(raw)["error"]
    assert maker(RawRecord("r:1", "", "auto", text_record("a <| b |> <im_start>", "b")))["error"] is None


def test_what_is_said_of_a_bad_record_can_be_written() -> None:
    """Half a surrogate pair, which JSON may hold, is no UTF-8: the log and the checkpoint would fail."""
    maker = DocumentMaker(config(Path("unused.jsonl")), MODEL_CONFIG, processor())
    error = maker(RawRecord("r:1", "", "auto", rb'{"\ud800": 1}'))["error"]
    assert error.encode() == rb"has the keys \ud800, expected messages or conversations"


def test_a_fault_of_the_program_names_the_record_and_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = DocumentMaker(config(Path("unused.jsonl")), MODEL_CONFIG, processor())
    monkeypatch.setattr("train.documents.assistant_labels", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        maker(RawRecord("r.jsonl:7", "", "auto", text_record("a", "b")))
    assert caught.value.__notes__ == ["while reading the record r.jsonl:7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"batch_rows": 0}, "batch_rows = 0, expected at least 1"),
        ({"workers": -1}, "workers = -1, expected at least 0"),
        ({"batch_rows": 4, "vision_groups": 3}, "not a multiple of vision_groups = 3"),
        ({"sources": (SourceConfig("a.jsonl", weight=1.0), SourceConfig("b.jsonl"))}, "b.jsonl has no weight"),
        ({"sources": (SourceConfig("a.jsonl", weight=1.0),), "epochs": 2}, "expected epochs: null"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"sources": (SourceConfig("a.jsonl"),), **changes})
    with pytest.raises(ConfigError, match="expected a positive number"):
        SourceConfig("a.jsonl", weight=0)


def test_data_that_cannot_work_is_refused(folder: Path) -> None:
    path = write_jsonl(folder / "three.jsonl", [text_record(str(i), "yes") for i in range(3)])
    with pytest.raises(ConfigError, match=r"multiple of spatial_merge_size\^2 = 4"):
        open_data(config(path, row_patches=66))
    with pytest.raises(ConfigError, match="3 records for 4 vision groups"):
        open_data(config(path, vision_groups=4))


RUN = """
import itertools, json, sys
from tests.test_data_pipeline import SETTINGS, digest, open_data, config
from pathlib import Path

def main():
    data = open_data(config(Path(sys.argv[1]), **SETTINGS, workers=2))
    data.set_state(json.loads(sys.argv[2]))
    for batch in itertools.islice(data, int(sys.argv[3])):
        print(digest(batch))
    print(json.dumps(data.get_state()))
    data.close()

if __name__ == "__main__":
    main()
"""
SETTINGS: dict[str, Any] = {"epochs": 1, "max_bad_records": 10}


def digest(batch: Batch) -> str:
    """Of every byte of a batch."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()


def test_workers_give_the_same_stream_and_resume_exactly(folder: Path) -> None:
    """2 worker processes, stopped and resumed with 2 and with 0. Runs with workers are programs of their own, as workers need."""
    path = write_jsonl(folder / "workers.jsonl", records(60, every_broken=25))
    (folder / "run.py").write_text(textwrap.dedent(RUN), encoding="utf-8")

    def run(state: dict[str, Any], count: int) -> tuple[list[str], dict[str, Any]]:
        command = [sys.executable, folder / "run.py", path, json.dumps(state), str(count)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "leaked" not in done.stderr and "Traceback" not in done.stderr
        *digests, state_line = done.stdout.splitlines()
        return digests, json.loads(state_line)

    data = open_data(config(path, **SETTINGS))
    start = data.get_state()
    whole = [digest(batch) for batch in data]
    part, state = run(start, 3)
    assert part == whole[:3] and len(whole) > 6
    rest, end = run(state, 1000)
    assert rest == whole[3:] and end == data.get_state()
    data.set_state(state)
    assert [digest(batch) for batch in data] == whole[3:]


@pytest.mark.parametrize("count", [pytest.param(10_000, marks=pytest.mark.slow), pytest.param(100_000, marks=pytest.mark.soak)])
def test_many_records_stream_in_flat_memory(count: int, tmp_path: Path, record: Any) -> None:
    """1 % broken in 8 ways, in 4 groups: each good record once, and no more memory at the end than early on."""
    (tmp_path / "good.png").write_bytes(png(0))
    path = write_jsonl(tmp_path / "many.jsonl", records(count, every_broken=100))
    settings = config(path, epochs=1, batch_rows=256, vision_groups=4, vision_rows=64, max_bad_records=1000, lookahead=8)
    seen, bad, early = Counter(), 0, 0
    for index in range(4):
        data = open_data(settings, index)
        for number, batch in enumerate(data):
            seen.update(questions(batch))
            if index == 0 and number == 3 * count // 10_000:
                early = resident_mib()
        bad += len(bad_records(data))
        data.close()
    record(f"data: MiB more after {count} records than after a tenth", resident_mib() - early)
    assert bad == count // 100
    assert seen == Counter({str(i): 1 for i in range(count) if i % 100 != 99})
    assert resident_mib() - early < 64


def resident_mib() -> float:
    """Memory of this process now (Linux), elsewhere its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
