"""`python -m qvlmoe_jax generate`: its answers, its conversation, its refusals; text that is cut at characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.tiny_checkpoint import write_checkpoint
from qvlmoe_jax.__main__ import _as_json, main, parse_mesh
from qvlmoe_jax.chat import TextStream, after
from qvlmoe_jax.errors import ConfigError, UsageError
from qvlmoe_jax.generation_config import GenerationConfig
from tests.xla_flags import ONE_DEVICE

ROOT = Path(__file__).resolve().parent.parent
CAT = ROOT / "examples" / "cat.png"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "hf"
    write_checkpoint(path)
    return path


@pytest.fixture(autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def run(directory: Path, *flags: str, **options) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, whose setting of jax's cache stays there."""
    command = [sys.executable, "-m", "qvlmoe_jax", "generate", str(directory), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


REFUSED = {
    "nothing to answer": ((), "nothing to answer"),
    "no such picture": (("--prompt", "hi", "--image", "no-such.png"), "no-such.png"),
    "no such axis": (("--prompt", "hi", "--mesh", "width=2"), "--mesh: 'width=2'"),
    "too few devices": (("--prompt", "hi", "--mesh", "fsdp=64"), "a mesh of fsdp=64 needs 64 devices"),
    "top-p of 2": (("--prompt", "hi", "--top-p", "2", "--temperature", "1"), "top_p = 2.0, expected a number from 0 to 1"),
    "no new tokens": (("--prompt", "hi", "--max-new-tokens", "0"), "error: --max-new-tokens 0: expected at least 1"),
    "an empty chunk": (("--prompt", "hi", "--prefill-chunk", "-3"), "error: --prefill-chunk -3: expected at least 1"),
    "unknown flag": (("--prompt", "hi", "--colour", "red"), "--colour"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line_and_status_2(name: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = REFUSED[name]
    assert main(["generate", str(directory), *flags]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_directory_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "hi"]) == 2
    assert "nowhere: not a directory" in capsys.readouterr().err


def test_mesh_sizes() -> None:
    assert parse_mesh("fsdp=8, expert=4") == {"fsdp": 8, "expert": 4}
    for wrong in ("fsdp", "fsdp=0", "fsdp=2,fsdp=2", "fsdp=two", "", "=3"):
        with pytest.raises(UsageError, match="is not an axis and its size"):
            parse_mesh(wrong)


def test_a_question_that_is_no_text_costs_that_question_only(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are not UTF-8, on standard input and on the command line."""
    with open(os.devnull, "wb") as nowhere:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(nowhere, encoding="ascii"))
        assert main(["generate", str(directory), "--prompt", "a\udcffb"]) == 2
        assert "is not Unicode text" in capsys.readouterr().err
        assert sys.stdin.readline() == "a\udcffb\n", "read as far as that, and then refused"
        print("\N{REPLACEMENT CHARACTER}\N{CAT}")


def test_an_answer_is_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, escaped in (("ascii", True), ("latin-1", True), ("utf8", False)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            print(_as_json({"text": "\xfc \N{CAT}"}), flush=True)
        line = stream.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]
        assert json.loads(line) == {"text": "\xfc \N{CAT}"} and line.isascii() == escaped


def test_more_than_the_memory_holds_is_one_line(directory: Path) -> None:
    result = run(directory, "--prompt", "hi", "--max-new-tokens", str(10**12))  # more than an address space
    assert result.returncode == 2 and not result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: not enough memory on the device: ") and "lower --max-new-tokens" in last
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_second_start_compiles_nothing(directory: Path) -> None:
    flags = ("--image", str(CAT), "--prompt", "What is this?", "--max-new-tokens", "12", "--seed", "4")
    first, second = (run(directory, *flags) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.strip()
    assert "programs compiled" in first.stderr and "tokens/s" in first.stderr
    assert "nothing compiled" in second.stderr


@pytest.mark.slow
def test_a_mesh_gives_the_same_answer(directory: Path) -> None:
    flags = ("--image", str(CAT), "--prompt", "What is this?", "--max-new-tokens", "12", "--temperature", "0")
    flags += ("--dtype", "float32")
    devices = os.environ | {"XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"}
    single, spread = run(directory, *flags), run(directory, *flags, "--mesh", "expert=2,tensor=2", env=devices)
    assert single.returncode == spread.returncode == 0, spread.stderr
    assert "on 4 devices" in spread.stderr and single.stdout == spread.stdout


@pytest.mark.slow
def test_a_conversation_reads_only_what_is_new(directory: Path) -> None:
    """In float32 the second answer is that of one long prompt, whose answers transformers' template would hold as text."""
    lines = f"Hello there\n/image {CAT}\nWhat is this?\n/image no-such.png\nAnd that?\nGood bye\n"
    flags = ("--chat", "--json", "--max-new-tokens", "8", "--temperature", "0", "--dtype", "float32")
    result = run(directory, *flags, input=lines)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 3 and "no-such.png" in result.stderr
    read = [line.split()[1:4:2] for line in result.stderr.splitlines() if line.startswith("read ")]
    assert [int(total) for _, total in read] == [answer["prompt_tokens"] for answer in answers]
    assert read[0][0] == read[0][1]
    for before, now, (new, total) in zip(answers, answers[1:], read[1:], strict=False):
        assert int(total) == int(new) + before["prompt_tokens"] + before["new_tokens"] and int(new) < int(total)
        assert now["finish_reason"] in ("stop", "length")


def test_a_conversation_makes_room_for_its_chunks(directory: Path) -> None:
    """The second turn's 500 to 512 tokens would fit into the first's cache of 1024, but in chunks of 500 they take 1000."""
    from qvlmoe_jax import Processor, Qwen3VLMoeForConditionalGeneration
    from qvlmoe_jax.chat import Chat

    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(directory)
    chat = Chat(model, Processor.from_pretrained(directory), {"max_new_tokens": 2, "prefill_chunk": 500, "eos_token_id": ()})
    chat.ask([{"type": "text", "text": "x" * 300}])
    answer = chat.ask([{"type": "text", "text": "y" * 490}])
    assert 500 < answer.read_tokens <= 512 and answer.prompt_tokens > 800


def test_text_comes_in_whole_characters() -> None:
    """A tokenizer of single bytes: pieces end where characters do, and what never becomes one comes at the end."""
    text = "né 猫🐈 ok"

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    stream = TextStream(decode)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text and stream.finish() == ""
    assert [piece for piece in pieces if piece] == list(text)
    broken = TextStream(decode)
    assert [broken.push(byte) for byte in "a🐈".encode()[:-1]] == ["a", "", "", ""]
    assert broken.finish() == "\N{REPLACEMENT CHARACTER}"


def test_text_that_depends_on_what_stands_before_it() -> None:
    """sentencepiece-like: a leading space is dropped at the start only."""
    words = [" one", " two", "", " three"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [stream.push(i) for i in range(4)] == ["one", " two", "", " three"]


def test_only_new_pictures_are_handed_on() -> None:
    from qvlmoe_jax import Qwen3VLMoeConfig
    from tests import prompts, tiny

    parts = [prompts.row(tiny.TINY, name) for name in ("two images", "video", "image", "text")]
    whole, config = prompts.batch([parts]), Qwen3VLMoeConfig.from_hf(tiny.TINY)
    lengths = np.cumsum([part["input_ids"].shape[1] for part in parts])
    for done, known in enumerate((0, *lengths[:-1])):
        rest = prompts.batch([parts[done:]])
        got = after(whole, int(known), config)
        for key in got:
            np.testing.assert_array_equal(got[key], rest[key])
        assert set(got) == set(rest) - {"attention_mask", "mm_token_type_ids"}


def test_generation_config(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert GenerationConfig.from_directory(tmp_path, {"text_config": {"eos_token_id": 7}}).eos_token_id == (7,)
    file.write_text(json.dumps({"eos_token_id": [5, 6], "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_k": 20}))
    read = GenerationConfig.from_directory(tmp_path, {"eos_token_id": 7})
    assert (read.eos_token_id, read.pad_token_id, read.sampling) == ((5, 6), 0, {"temperature": 0.7, "top_k": 20})
    assert read == GenerationConfig() and hash(read) == hash(GenerationConfig()), "no reason to compile again"
    file.write_text(json.dumps({"temperature": 0.7}))
    assert GenerationConfig.from_directory(tmp_path).sampling["temperature"] == 0, "do_sample is off unless it says on"
    file.write_text(json.dumps({"do_sample": True, "top_p": 0.9}))
    as_transformers = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    assert GenerationConfig.from_directory(tmp_path).sampling == as_transformers, "sampling without a temperature is not greedy"
    for wrong in ({"eos_token_id": "x"}, {"eos_token_id": 2**31}, {"eos_token_id": [True]}, {"temperature": "hot"}, []):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"generation_config\.json: .*expected"):
            GenerationConfig.from_directory(tmp_path)
