"""The processor as its user meets it: a small checkpoint's directory, options, Batch, and each mistake's one line."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvlmoe_jax import Processor
from qvlmoe_jax.chat_template import ChatTemplate
from qvlmoe_jax.errors import BatchError, MediaError, ProcessorError
from qvlmoe_jax.processor_files import read_settings
from qvlmoe_jax.tokenizer import Tokenizer
from tests.processor_cases import clip, picture

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny_checkpoint() -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return __import__("tiny_checkpoint")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint.write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Processor:
    return Processor.from_pretrained(checkpoint)


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint's small files with JSON keys changed (None removes one) or whole files replaced."""

    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, tmp_path / path.name)

    def change(file: str, content: Any = None, /, **keys: Any) -> Path:
        path = tmp_path / file
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is False:
            path.unlink()
        else:
            values = json.loads(path.read_text()) if path.exists() else {}
            values |= keys
            path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return tmp_path

    return change


def ask(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def image(height: int = 64, width: int = 96, seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(height, width, seed)}


class TestDirectories:
    def test_a_converted_directory_gives_the_same(self, checkpoint: Path, processor: Processor, tmp_path: Path) -> None:
        from convert.hf2jax import hf2jax

        hf2jax(checkpoint, tmp_path / "converted")
        converted = Processor.from_pretrained(tmp_path / "converted")
        conversation = ask(image(), "What?", {"type": "video", "video": clip(6, 40, 40)})
        expected = processor.encode(conversation)
        got = converted.encode(conversation)
        assert list(got) == list(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(got[key], value)

    def test_transformers_is_not_needed(self, checkpoint: Path) -> None:
        code = (
            "import sys\nfor name in ('torch', 'transformers', 'torchvision', 'qwen_vl_utils'): sys.modules[name] = None\n"
            "from qvlmoe_jax import Processor\n"
            f"p = Processor.from_pretrained({str(checkpoint)!r})\n"
            "ids = p.encode([{'role': 'user', 'content': 'Hi'}])['input_ids'][0]\n"
            "print(p.decode(ids), 'jax' in sys.modules, 'av' in sys.modules)"
        )
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.stdout.split() == ["user", "Hi", "assistant", "False", "False"], run.stderr

    def test_vocab_and_merges_alone(self, checkpoint: Path, processor: Processor, changed: Callable[..., Path]) -> None:
        whole = json.loads((checkpoint / "tokenizer.json").read_text())
        added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in whole["added_tokens"]}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
        changed("tokenizer.json", False)
        changed("vocab.json", json.dumps(whole["model"]["vocab"]))
        changed("merges.txt", "\n".join(["#version: 0.2", *merges]))
        directory = changed("tokenizer_config.json", added_tokens_decoder=added)
        text = "<|im_start|>Permission is don't 123 naïve\n\n <think> 日本<|image_pad|>"
        (got,), (expected,) = Tokenizer.from_pretrained(directory).encode([text]), processor.tokenizer.encode([text])
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "named", "chat_template.jinja"])
    def test_where_the_template_is(self, changed: Callable[..., Path], place: str) -> None:
        template = "T{{ messages[0].content }}{{ eos_token }}"
        changed("tokenizer_config.json", chat_template=None)
        if place != "chat_template.jinja":
            changed("chat_template.jinja", False)
        if place == "named":
            named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
            directory = changed("tokenizer_config.json", chat_template=named)
        elif place == "chat_template.jinja":
            changed("chat_template.json", chat_template="no")
            directory = changed(place, template)
        else:
            directory = changed(place, chat_template=template)
        processor = Processor.from_pretrained(directory)
        ids = processor.encode([{"role": "user", "content": "x"}])["input_ids"][0]
        assert processor.decode(ids, skip_special_tokens=False) == "Tx<|im_end|>"

    def test_nested_settings_of_transformers_5(self, changed: Callable[..., Path]) -> None:
        nested = {"image_processor": {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "resample": 2}}
        nested["video_processor"] = {"size": {"shortest_edge": 2048, "longest_edge": 8192}, "max_frames": 16}
        pictures, videos = read_settings(changed("processor_config.json", **nested))
        assert (pictures.min_pixels, pictures.max_pixels, pictures.resample) == (1024, 4096, 2)
        assert (videos.min_pixels, videos.max_pixels, videos.max_frames) == (2048, 8192, 16)

    def test_older_spelling_and_missing_files(self, changed: Callable[..., Path], tmp_path: Path) -> None:
        changed("video_preprocessor_config.json", False)
        pictures, videos = read_settings(changed("preprocessor_config.json", size=None, min_pixels=1024, max_pixels=2048))
        assert (pictures.min_pixels, pictures.max_pixels) == (videos.min_pixels, videos.max_pixels) == (1024, 2048)
        pictures, videos = read_settings(tmp_path / "empty")
        assert (pictures.max_pixels, videos.max_pixels, pictures.patch_size) == (16777216, 25165824, 16)

    @pytest.mark.parametrize(
        ("file", "content", "keys", "message"),
        [
            ("tokenizer.json", False, {}, "no tokenizer found, expected tokenizer.json"),
            ("tokenizer.json", "{}", {}, "cannot be read"),
            ("tokenizer_config.json", "[]", {}, "holds a list, expected a JSON object"),
            ("tokenizer_config.json", "{", {}, "is not JSON"),
            ("tokenizer_config.json", None, {"padding_side": "up"}, "padding_side is 'up', expected 'left' or 'right'"),
            ("chat_template.jinja", "{% if %}", {}, "the chat template does not compile"),
            ("preprocessor_config.json", None, {"patch_size": 14}, "patch_size is 14, but config.json's vision_config has 16"),
            ("preprocessor_config.json", None, {"image_mean": [0.5]}, "image_mean is .* expected three numbers"),
            ("video_preprocessor_config.json", None, {"merge_size": 3}, "merge_size is 3, but config.json"),
            ("video_preprocessor_config.json", None, {"fps": -1}, "fps is -1, expected more than 0"),
            ("video_preprocessor_config.json", None, {"max_frames": 0}, "max_frames is 0, expected a positive integer"),
            ("tokenizer_config.json", "[" * 10**5, {}, "is not JSON"),
            ("tokenizer_config.json", None, {"image_token": 5}, "image_token is 5, expected the text of a token"),
            ("chat_template.jinja", b"\xff\xfe", {}, "chat_template.jinja is not UTF-8 text"),
            ("processor_config.json", '{"image_processor": 5}', {}, "image_processor is 5, expected an object"),
            ("preprocessor_config.json", None, {"size": 5}, "size is 5, expected an object"),
            ("preprocessor_config.json", None, {"image_mean": 5}, "image_mean is 5, expected three numbers"),
            ("preprocessor_config.json", None, {"image_mean": ["a", "b", "c"]}, "image_mean is .* expected three numbers"),
            ("preprocessor_config.json", None, {"image_std": [0, 0, 0]}, r"image_std is \[0, 0, 0\] .* numbers other than 0"),
            ("preprocessor_config.json", None, {"rescale_factor": "x"}, "rescale_factor 'x', expected numbers other than 0"),
            ("video_preprocessor_config.json", None, {"fps": "x"}, "fps is 'x', expected more than 0"),
            ("config.json", None, {"image_token_id": 5}, "but config.json's image_token_id is 5"),
        ],
    )
    def test_a_bad_file_is_named(
        self, changed: Callable[..., Path], file: str, content: Any, keys: dict[str, Any], message: str
    ) -> None:
        directory = changed(file, content, **keys)
        with pytest.raises(ProcessorError, match=message) as caught:
            Processor.from_pretrained(directory)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("template", [5, {"default": 5}, [{"nam": "x"}], ["x"]])
    def test_a_template_that_is_no_text(self, changed: Callable[..., Path], template: Any) -> None:
        changed("chat_template.jinja", False)
        with pytest.raises(ProcessorError, match=r"chat.template .* expected .* text"):
            Processor.from_pretrained(changed("tokenizer_config.json", chat_template=template))

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ProcessorError, match="is not a directory"):
            Processor.from_pretrained(tmp_path / "none")
        with pytest.raises(ProcessorError, match="expected 'replaced' or 'wrapped'"):
            Processor.from_pretrained(tmp_path, video_prompt="both")  # pyright: ignore[reportArgumentType]

    def test_no_config_and_no_template(self, changed: Callable[..., Path]) -> None:
        processor = Processor.from_pretrained(changed("config.json", False))
        assert processor.encode(ask("Hi"))["input_ids"].shape[0] == 1
        with pytest.raises(ProcessorError, match=r"no config\.json"):
            processor(ask("Hi"))
        changed("chat_template.jinja", False)
        processor = Processor.from_pretrained(changed("tokenizer_config.json", chat_template=None))
        with pytest.raises(ProcessorError, match="has no chat template"):
            processor.encode(ask("Hi"))


class TestBatch:
    def test_batch_is_from_hf_of_encode(self, processor: Processor) -> None:
        conversations = [ask("Hi"), ask(image(), image(100, 40), "What?"), ask({"type": "video", "video": clip(8, 64, 64)}, "?")]
        arrays, batch = processor.encode(conversations), processor(conversations)
        B, L = arrays["input_ids"].shape
        assert batch.input_ids.shape[0] == B == 3 and batch.input_ids.shape[1] >= L
        np.testing.assert_array_equal(
            batch.input_ids[:, :L] * arrays["attention_mask"], arrays["input_ids"] * arrays["attention_mask"]
        )
        merged = (arrays["image_grid_thw"].prod(1).sum() + arrays["video_grid_thw"].prod(1).sum()) // 4
        assert (batch.visual_index >= 0).sum() == merged

    def test_buckets(self, processor: Processor) -> None:
        batch = processor(ask(image(), "What?"), text_length=256, vision_rows=2, row_patches=512)
        assert batch.input_ids.shape == (1, 256) and batch.pixel_values.shape[:3] == (1, 2, 512)
        with pytest.raises(BatchError, match="text_length = 8 is too short"):
            processor(ask("a long question about nothing at all"), text_length=8)

    def test_without_the_prompt_for_an_answer(self, processor: Processor) -> None:
        with_it, without = (processor.encode(ask("Hi"), add)["input_ids"][0] for add in (True, False))
        assert (
            processor.decode(with_it, skip_special_tokens=False).removeprefix(
                processor.decode(without, skip_special_tokens=False)
            )
            == "<|im_start|>assistant\n"
        )

    def test_padding(self, processor: Processor, changed: Callable[..., Path]) -> None:
        conversations = [ask("Hi"), ask("Hello, how are you?")]
        default = processor.encode(conversations)
        assert default["attention_mask"][0, 0] == 0 and default["attention_mask"][:, -1].all()  # left, ready to generate
        pad = processor.tokenizer.id_of("<|endoftext|>")
        assert set(default["input_ids"][default["attention_mask"] == 0]) == {pad}
        right = Processor.from_pretrained(changed("tokenizer_config.json", padding_side="right"))
        assert right.encode(conversations)["attention_mask"][:, 0].all()
        again = right.encode(conversations, padding_side="left")
        np.testing.assert_array_equal(again["input_ids"], default["input_ids"])
        with pytest.raises(ProcessorError, match="padding_side is 'middle'"):
            right.encode(conversations, padding_side="middle")  # pyright: ignore[reportArgumentType]

    def test_the_callers_messages_stay_as_they_are(self, processor: Processor) -> None:
        conversation = ask(image(), "What?")
        before = repr(conversation)
        processor.encode(conversation, add_generation_prompt=False, continue_final_message=True)
        assert repr(conversation) == before

    def test_keys_that_are_none(self, processor: Processor) -> None:
        call = {"name": "f", "arguments": {}}
        with_none = [
            {"role": "user", "content": "Hi", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        without = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
        np.testing.assert_array_equal(processor.encode(with_none)["input_ids"], processor.encode(without)["input_ids"])


class TestOptions:
    def test_parts_under_every_key(self, processor: Processor, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        picture(64, 96).save(path)
        data = base64.b64encode(path.read_bytes()).decode()
        parts = (
            *({"type": "image", "image": path}, {"type": "image", "url": str(path)}, {"type": "image", "path": str(path)}),
            *({"type": "image", "base64": data}, {"image": str(path)}, {"type": "image_url", "image_url": path.as_uri()}),
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", "detail": "high"}},
        )
        expected = processor.encode(ask(image(), "?"))
        for part in parts:
            got = processor.encode(ask(part, "?"))
            for key, value in expected.items():
                np.testing.assert_array_equal(got[key], value)

    def test_sizes(self, processor: Processor) -> None:
        big = ask(image(640, 640), "?")
        for options in ({"max_pixels": 65536}, {"size": {"shortest_edge": 1024, "longest_edge": 65536}}):
            assert processor.encode(big, images_kwargs=options)["image_grid_thw"].tolist() == [[1, 16, 16]]
        assert processor.encode(big, images_kwargs={"do_resize": False})["image_grid_thw"].tolist() == [[1, 40, 40]]
        with pytest.raises(MediaError, match="100 x 64 and do_resize is off; expected multiples of 32"):
            processor.encode(ask(image(64, 100), "?"), images_kwargs={"do_resize": False})
        with pytest.raises(ProcessorError, match="images_kwargs: unknown option 'max_pixel', expected one of .*max_pixels"):
            processor.encode(big, images_kwargs={"max_pixel": 3})
        with pytest.raises(ProcessorError, match="min_pixels = 65536 is more than max_pixels = 100"):
            processor.encode(big, images_kwargs={"max_pixels": 100})

    def test_a_sliver(self, processor: Processor, tmp_path: Path) -> None:
        sliver, file = picture(4001, 20), tmp_path / "sliver.png"
        sliver.save(file)
        for source, name in ((sliver, "the picture"), (str(file), str(file))):
            with pytest.raises(MediaError) as caught:
                processor.encode(ask({"type": "image", "image": source}, "?"))
            assert str(caught.value) == f"{name} is 20 x 4001 pixels, an aspect ratio of 200.05; expected at most 200: crop it"

    def test_normalisation(self, processor: Processor) -> None:
        plain = processor.encode(ask(image(256, 256), "?"), images_kwargs={"do_normalize": False})["pixel_values"]
        raw = processor.encode(ask(image(256, 256), "?"), images_kwargs={"do_normalize": False, "do_rescale": False})[
            "pixel_values"
        ]
        assert (raw == np.round(raw)).all() and raw.max() > 200
        np.testing.assert_allclose(plain, raw / 255, rtol=1e-6)
        per_channel = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
        got = processor.encode(ask(image(256, 256), "?"), images_kwargs=per_channel)["pixel_values"].reshape(-1, 3, 512)
        expected = (plain.reshape(-1, 3, 512) - np.array([0.1, 0.2, 0.3], np.float32)[:, None]) / np.array(
            [0.5, 0.6, 0.7], np.float32
        )[:, None]
        np.testing.assert_allclose(got, expected, atol=1e-6)

    def test_frames(self, processor: Processor) -> None:
        video = ask({"type": "video", "video": clip(48, 64, 64)}, "?")
        meta = {"fps": 12.0}

        def steps(**options: Any) -> int:
            return int(processor.encode(video, video_metadata=meta, **options)["video_grid_thw"][0, 0])

        assert (steps(), steps(fps=1), steps(num_frames=6), steps(do_sample_frames=False)) == (4, 2, 3, 24)
        assert steps(videos_kwargs={"max_frames": 5}) == 3
        with pytest.raises(ProcessorError, match="fps and num_frames exclude each other"):
            steps(fps=1, num_frames=3)
        with pytest.raises(ProcessorError, match="fps is 0, expected more than 0"):
            steps(fps=0)
        assert steps() == int(processor.encode(video, video_metadata=[[meta]])["video_grid_thw"][0, 0])
        with pytest.raises(ProcessorError, match="video_metadata has 2 entries for 1 videos"):
            processor.encode(video, video_metadata=[meta, meta])
        with pytest.raises(MediaError, match="has 3 frames_indices for 48 frames"):
            processor.encode(video, video_metadata={"frames_indices": [1, 2, 3]}, do_sample_frames=False)

    def test_cap(self, processor: Processor) -> None:
        """reference.md's figure: eight frames of 1080p."""
        video = ask({"type": "video", "video": np.zeros((8, 1080, 1920, 3), np.uint8)}, "?")
        grid = processor.encode(video, do_sample_frames=False, cap_pixels_per_frame=True)["video_grid_thw"]
        assert grid.tolist() == [[4, 40, 72]]

    def test_a_misspelt_option(self, processor: Processor) -> None:
        with pytest.raises(ProcessorError, match="unknown option 'max_pixels': neither the processor's nor one that"):
            processor.encode(ask("Hi"), max_pixels=3)


class TestConversations:
    @pytest.mark.parametrize(
        ("conversation", "message"),
        [
            ("Hi", "got a str 'Hi', expected conversations"),
            ([], "expected conversations"),
            ([[]], "a conversation is a list"),
            (["Hi"], "a conversation is a str"),
            ([{"content": "Hi"}], "message 0 is a dict"),
            ([{"role": "user", "content": 3}], "message 0's content is a int 3"),
            ([{"role": "user", "content": ["Hi"]}], "message 0 has a part a str 'Hi', expected a dict"),
            (ask({"type": "audio", "audio": "x.wav"}), "a part of type 'audio', expected text, image or video"),
            (ask({"type": "image"}), "message 0's image part holds no data, expected one of the keys image"),
            (ask({"type": "video", "image_": "x"}), "message 0's video part holds no data"),
            (ask("<|image_pad|>"), r"hold 0 pictures, but their text has 1 placeholders <\|image_pad\|>"),
        ],
    )
    def test_what_is_no_conversation(self, processor: Processor, conversation: Any, message: str) -> None:
        with pytest.raises(ProcessorError, match=message) as caught:
            processor.encode(conversation)
        assert "\n" not in str(caught.value)

    def test_a_picture_that_fails_among_others(self, processor: Processor) -> None:
        with pytest.raises(MediaError, match="no/such.png: no such file|'no/such.png': no such file"):
            processor.encode(ask(image(), {"type": "image", "image": "no/such.png"}, image()))

    def test_one_by_one_or_in_a_batch(self, processor: Processor) -> None:
        conversations = [ask(image(seed=s), "What?", image(80, 64 + 32 * s, s)) for s in range(4)]
        batch = processor.encode(conversations)
        singles = [processor.encode(one) for one in conversations]
        np.testing.assert_array_equal(batch["pixel_values"], np.concatenate([one["pixel_values"] for one in singles]))
        for row, mask, one in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
            np.testing.assert_array_equal(row[mask == 1], one["input_ids"][0])


class TestTemplate:
    def render(self, source: str, messages: Any = ({"role": "user", "content": "Hi"},), **options: Any) -> str:
        return ChatTemplate(source, {"eos_token": "<e>"}).render(list(messages), **options)

    def test_what_templates_on_the_hub_use(self) -> None:
        assert self.render("{{ {'b': 1, 'a': '<é>'} | tojson }}") == '{"b": 1, "a": "<é>"}'
        assert self.render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
        assert len(self.render("{{ strftime_now('%Y') }}")) == 4
        assert self.render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}x") == "x"
        assert self.render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"
        assert self.render("{{ eos_token }}{{ style }}", style="s") == "<e>s"
        assert self.render("{{ messages[0].reasoning_content }}", [{"role": "a", "thinking": "hm"}]) == "hm"

    def test_a_template_refuses(self) -> None:
        with pytest.raises(ProcessorError, match="the chat template refuses the messages: no system"):
            self.render("{{ raise_exception('no system') }}")

    @pytest.mark.parametrize(
        "source",
        ["{{ 1 / 0 }}", "{{ range(10**9) | list }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"],
    )
    def test_a_template_that_fails(self, source: str) -> None:
        with pytest.raises(ProcessorError, match="the chat template refuses the messages"):
            self.render(source)

    def test_a_text_that_is_not_unicode(self, processor: Processor) -> None:
        with pytest.raises(ProcessorError, match=r"'.*a\\udcffb.* is not Unicode text; expected UTF-8"):
            processor.encode([{"role": "user", "content": "a\udcffb"}])

    @pytest.mark.parametrize(
        "attack",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].content.save('x') }}",
            "{{ cycler.__init__.__globals__ }}",
        ],
    )
    def test_a_template_sees_data_only(self, attack: str) -> None:
        with pytest.raises(ProcessorError, match="refuses the messages"):
            self.render(attack, [{"role": "user", "content": picture(4, 4)}])

    def test_tools_are_schemas(self) -> None:
        with pytest.raises(ProcessorError, match="tools contain a method, expected dicts"):
            self.render("", tools=[self.render])  # pyright: ignore[reportArgumentType]

    def test_continue_final_message(self) -> None:
        source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
        two = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " The answer "}]
        assert self.render(source, two, continue_final_message=True) == "[a][The answer"
        with pytest.raises(ProcessorError, match="exclude each other"):
            self.render(source, two, continue_final_message=True, add_generation_prompt=True)
        with pytest.raises(ProcessorError, match="has no text"):
            self.render(source, [{"role": "assistant"}], continue_final_message=True)
        with pytest.raises(ProcessorError, match="does not print the last message"):
            self.render("x", two, continue_final_message=True)

    def test_values_that_are_not_json(self) -> None:
        seen = self.render(
            "{{ messages[0].flag }} {{ messages[0].number + 1 }} {{ messages[0].content }}",
            [{"role": "user", "flag": np.bool_(False), "number": np.int64(2), "content": np.zeros(3)}],
        )
        assert seen == "False 3 <ndarray>"


def test_decode_refuses_what_is_no_row(processor: Processor) -> None:
    assert processor.decode([]) == ""
    assert processor.decode(np.array(processor.tokenizer.id_of("<|im_end|>")), skip_special_tokens=False) == "<|im_end|>"
    for bad in (np.zeros((2, 2), int), [0.5]):
        with pytest.raises(ProcessorError, match="expected one row of integers"):
            processor.decode(bad)
