"""Every spelling of a record gives the same messages; what is wrong with a broken one is said by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.images import load_image
from tests.data_cases import data_uri, picture, picture_record, png, text_record, write_jsonl
from train.data_config import SourceConfig
from train.formats import RecordError, to_messages
from train.media import load_media
from train.records import RawRecord, Records

QUESTION, ANSWER, SYSTEM = "is there a red shape?", "yes", "be brief"

EXPECTED = [
    {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]

SPELLINGS: dict[str, dict[str, Any]] = {
    "hf messages and images": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
        "images": ["a.png"],
    },
    "hf, null fields as parquet fills them": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM, "image": None}]},
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
        "images": ["a.png"],
        "conversations": None,
        "videos": None,
    },
    "hf, picture in the content": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "trl: text only, pictures beside it": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ],
        "images": ["a.png"],
    },
    "llama-factory messages": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "<image>" + QUESTION},
            {"role": "assistant", "content": ANSWER},
        ],
        "images": ["a.png"],
    },
    "openai": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": QUESTION}],
            },
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "qwen conversations": {
        "image": "a.png",
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "human", "value": "<image>\n" + QUESTION},
            {"from": "gpt", "value": ANSWER},
        ],
    },
    "sharegpt with system": {
        "system": SYSTEM,
        "images": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>" + QUESTION}, {"from": "gpt", "value": ANSWER}],
    },
    "first qwen-vl": {
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "user", "value": f"Picture 1: <img>a.png</img>\n{QUESTION}"},
            {"from": "assistant", "value": ANSWER},
        ]
    },
}


def read(record: Any, format: Any = "auto") -> list[dict[str, Any]]:
    payload = record if isinstance(record, bytes) else json.dumps(record).encode()
    return to_messages(RawRecord("r:1", "", format, payload))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_agree(spelling: str) -> None:
    assert read(SPELLINGS[spelling]) == EXPECTED


def test_many_pictures_and_turns_keep_their_order() -> None:
    record = {
        "image": ["a", "b", "c"],
        "video": "v",
        "conversations": [
            {"from": "human", "value": "<image> one <video> two <image>"},
            {"from": "gpt", "value": "x"},
            {"from": "human", "value": "and <image>?"},
            {"from": "gpt", "value": "y"},
        ],
    }
    content = [turn["content"] for turn in read(record)]
    assert [item.get("image") or item.get("video") or item["text"] for item in content[0]] == ["a", "one", "v", "two", "b"]
    assert [item.get("image") or item["text"] for item in content[2]] == ["and", "c", "?"]


def turns(*roles_and_contents: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in roles_and_contents]}


BROKEN = {
    "not json": (b'{"messages": [', "is not JSON"),
    "not utf-8": (b'{"messages": "\xff\xfe"}', "is not JSON"),
    "not an object": ([1, 2], "expected an object"),
    "nested beyond reading": (b"[" * 100_000, "not JSON|nested too deeply"),
    "no known key": ({"prompt": "a", "answer": "b"}, "has the keys answer, prompt, expected messages or conversations"),
    "turns are text": ({"messages": "hello"}, "expected a list of turns"),
    "no turns": ({"messages": []}, "expected a list of turns"),
    "a turn is text": ({"messages": ["hello"]}, "turn 0 is 'hello', expected an object"),
    "unknown role": (turns(("user", "a"), ("robot", "b")), "turn 1 has the role 'robot'"),
    "role is a list": (turns((["user"], "a"), ("assistant", "b")), "turn 0 has the role \\['user'\\], expected one of"),
    "role is an object": (turns(({"a": 1}, "a"), ("assistant", "b")), "turn 0 has the role {'a': 1}, expected one of"),
    "no content": (turns(("user", None), ("assistant", "b")), "turn 0 has the content None"),
    "number as content": (turns(("user", [3]), ("assistant", "b")), "content item 3"),
    "unknown item": (turns(("user", [{"type": "audio"}]), ("assistant", "b")), "type 'audio'"),
    "item type is a list": (turns(("user", [{"type": ["image"]}]), ("assistant", "b")), "content item of type \\['image'\\]"),
    "item type is an object": (turns(("user", [{"type": {"a": 1}}]), ("assistant", "b")), "content item of type {'a': 1}"),
    "text item without text": (turns(("user", [{"type": "text"}]), ("assistant", "b")), "expected text"),
    "no assistant": (turns(("user", "a")), "no assistant turn"),
    "empty answer": (turns(("user", "a"), ("assistant", " \n")), "empty assistant turn"),
    "picture in the answer": (turns(("user", "a"), ("assistant", [{"type": "image", "image": "x"}])), "in an assistant turn"),
    "too few pictures": ({**picture_record("q", "a", "x"), "images": []}, "asks for more images than the record has"),
    "too many pictures": ({**picture_record("q", "a", "x"), "images": ["x", "y"]}, "1 image\\(s\\), 0 video\\(s\\) more"),
    "tools": ({**text_record("q", "a"), "tools": [{"name": "f"}]}, "has tools"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_say_what_is_wrong(case: str) -> None:
    record, message = BROKEN[case]
    with pytest.raises(RecordError, match=message):
        read(record)


def test_a_stated_format_is_the_one_that_is_read() -> None:
    record = {**text_record("q", "a"), "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "b"}]}
    assert read(record, "conversations")[0]["content"][0]["text"] == "p"
    assert read(record)[0]["content"][0]["text"] == "q"


def test_pictures_from_everywhere_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    given = [
        "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").as_uri(),
        data_uri(1),
        png(1),
        {"bytes": png(1), "path": None},
    ]
    given += [{"bytes": None, "path": "a.png"}, picture(1)]
    for source in given:
        loaded = load_media([{"role": "user", "content": [{"type": "image", "image": source}]}], str(tmp_path))
        assert np.array_equal(np.asarray(loaded[0]["content"][0]["image"]), np.asarray(picture(1))), source


def special_pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """By file name, with options for saving: what a bare `convert("RGB")` would show otherwise."""
    levels = np.random.default_rng(0).integers(0, 256, (48, 64, 4), np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    return {
        "alpha.png": (Image.fromarray(levels), {}),
        "grey.png": (Image.fromarray(levels[..., 0].astype(np.uint16) * 257), {}),
        "palette.png": (Image.fromarray(levels[..., :3]).quantize(16), {"transparency": 3}),
        "turned.jpg": (Image.fromarray(levels[..., :3]), {"exif": turned}),
        "turned.png": (Image.fromarray(levels), {"exif": turned}),
        "turned.webp": (Image.fromarray(levels), {"exif": turned}),
    }


@pytest.mark.parametrize("name", special_pictures())
def test_training_sees_the_pixels_that_inference_sees(tmp_path: Path, name: str) -> None:
    image, options = special_pictures()[name]
    path = tmp_path / name
    image.save(path, **options)
    content = path.read_bytes()
    uri = "data:;base64," + base64.b64encode(content).decode()
    with Image.open(path) as opened:
        for given in (name, content, uri, {"bytes": content, "path": None}, opened):
            (message,) = load_media([{"role": "user", "content": [{"type": "image", "image": given}]}], str(tmp_path))
            seen = load_image(message["content"][0]["image"])  # what the processor does with it
            assert np.array_equal(np.asarray(seen), np.asarray(load_image(path)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "which does not exist"),
        ("name-too-long" * 100, "which does not exist"),
        ("null\0byte", "which does not exist"),
        ("https://example.com/a.png", "expected a local file"),
        ("http://[::1", "is no URL .*, expected a local file"),
        ("file://[abc/x.png", "is no URL .*, expected a local file"),
        ("broken.png", "cannot be used: /.*/broken.png has no format"),
        ("drawing.eps", r"cannot be used: /.*/drawing.eps is a drawing \(EPS\)"),
        (png(1)[:200], "cannot be used: the picture cannot be decoded"),
        (b"", "cannot be used: the picture has no format"),
        (Image.new("F", (8, 8)), "cannot be used: the picture holds floating-point pixels"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png,abc", "expected data:TYPE;base64,DATA"),
        (3, "given as int"),
        (None, "given as NoneType"),
    ],
)
def test_bad_pictures_say_what_is_wrong(source: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    picture(1).save(tmp_path / "drawing.eps")
    with pytest.raises(RecordError, match=message):
        load_media([{"role": "user", "content": [{"type": "image", "image": source}]}], str(tmp_path))


def payloads(path: Path, cache: Path) -> list[Any]:
    records = Records([SourceConfig(str(path))], cache_dir=str(cache))
    got = [records[i].payload for i in range(len(records))]
    return [json.loads(p) if isinstance(p, bytes) else p for p in got]


def test_files_of_every_kind_hold_the_same_records(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**text_record(f"question {i} \u00e9\u4e2d", f"a{i}" * (i % 50)), "system": str(i)} for i in range(3000)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    (tmp_path / "r.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet", row_group_size=700)
    for suffix in ("jsonl", "json", "parquet"):
        assert payloads(tmp_path / f"r.{suffix}", tmp_path / "cache") == rows, suffix
    assert payloads(tmp_path / "r.parquet", tmp_path / "cache") == rows  # from the copy that is there now


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path: Path) -> None:
    """Python has no name for a time in nanoseconds, and nothing here asks for it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [text_record(f"q{i}", "a") for i in range(3)]
    when = pa.array([2**62 + 1] * 3, pa.timestamp("ns"))
    pq.write_table(pa.Table.from_pylist(rows).append_column("when", when), tmp_path / "r.parquet")
    assert payloads(tmp_path / "r.parquet", tmp_path / "cache") == rows
    pq.write_table(pa.table({"when": when}), tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="has the columns when, expected messages or conversations"):
        Records([SourceConfig(str(tmp_path / "none.parquet"))], cache_dir=str(tmp_path / "cache"))


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [text_record(f"question {i}", f"answer {i}" * 20) for i in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    content = bytearray((tmp_path / "r.parquet").read_bytes())
    content[3000:3400] = b"\xff" * 400
    (tmp_path / "r.parquet").write_bytes(bytes(content))
    with pytest.raises(ConfigError, match="r.parquet cannot be read as Parquet"):
        Records([SourceConfig(str(tmp_path / "r.parquet"))], cache_dir=str(tmp_path / "cache"))


def test_a_key_without_a_value_is_none() -> None:
    with pytest.raises(RecordError, match=r"has the keys n, expected messages or conversations"):
        read({"messages": None, "n": 1})


def test_lines_are_numbered_and_blank_ones_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('\n{"a": 1}\r\n  \n{"a": 2}', encoding="utf-8")
    records = Records([SourceConfig(str(path)), SourceConfig(str(path), root="/media")])
    assert [records[i].name for i in range(4)] == [f"{path}:2", f"{path}:4"] * 2
    assert [records[i].root for i in range(4)] == [str(tmp_path)] * 2 + ["/media"] * 2
    texts = [records[i].payload for i in range(4)]
    assert [json.loads(text)["a"] for text in texts if isinstance(text, bytes)] == [1, 2, 1, 2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 22])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b" " * 40])
def test_lines_of_any_length_may_be_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, end: bytes) -> None:
    """However the file is cut into chunks."""
    monkeypatch.setattr("train.records._CHUNK", chunk)
    path = tmp_path / "r.jsonl"
    content = b"\n".join([b'{"a": 1}', b" " * 40, b"\t\r", b'   {"a": 2}', b"", b'{"a": 3}' + end])
    path.write_bytes(content)
    records = Records([SourceConfig(str(path))])
    expected = [(f"{path}:{i + 1}", line) for i, line in enumerate(content.split(b"\n")) if line.strip()]
    assert [(records[i].name, records[i].payload) for i in range(len(records))] == expected
    assert len(expected) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"a,b", "ends in '.csv'"),
        ("r.jsonl", b"\n\n", "holds no records"),
        ("r.jsonl", b"", "holds no records"),
        ("r.jsonl", b" " * 40, "holds no records"),
        ("r.json", b'{"a": 1}', "does not begin with"),
        ("r.json", b'[{"a": 1}, {"a": ]', "no valid JSON at byte"),
        ("r.json", b'[{"a": 1}', "no valid JSON at byte"),
        ("r.json", b"[]", "holds no records"),
        ("r.parquet", b"PAR1 no", "cannot be read as Parquet"),
    ],
)
def test_files_that_are_no_list_of_records_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Records([SourceConfig(str(tmp_path / name))], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="does not exist"):
        Records([SourceConfig(str(tmp_path / "no.jsonl"))])
