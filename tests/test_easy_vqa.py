"""The example that learns: its records are what they claim, and its committed files are what its script writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.batch import IGNORED_LABEL
from tests.data_cases import CHECKPOINT, MODEL_CONFIG, processor
from train.config import load_config
from train.documents import DocumentMaker
from train.records import RawRecord

EXAMPLES = CHECKPOINT.parent


def load_script(name: str) -> ModuleType:
    """A file of examples/, with its neighbours importable as they are to a script."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("easy_vqa_data")


@pytest.fixture(scope="module")
def held_out(script: ModuleType) -> tuple[list[np.ndarray], list[tuple[str, str, int]]]:
    return script.load_split("test")


def test_the_committed_files_are_what_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    import easy_vqa

    questions, answers, _ = easy_vqa.get_train_questions()
    script.write_start(tmp_path, script.tokenizer_words(zip(questions, answers, strict=True)))
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {path.name for path in CHECKPOINT.iterdir()}
    for name in names - {"config.json"}:
        assert (tmp_path / name).read_text(encoding="utf-8") == (CHECKPOINT / name).read_text(encoding="utf-8"), name
    assert Qwen3VLMoeConfig.from_json(tmp_path) == Qwen3VLMoeConfig.from_json(CHECKPOINT)


def test_every_part_of_the_architecture_is_in_it() -> None:
    text, vision = MODEL_CONFIG.text_config, MODEL_CONFIG.vision_config
    assert set(text.layer_kinds()) == {"moe"} and text.num_experts > text.num_experts_per_tok > 1
    assert len(vision.deepstack_visual_indexes) >= 2 and vision.depth > 2
    assert all(text.mrope_section)


def test_a_moved_shape_is_the_same_shape(script: ModuleType, held_out: tuple[list[np.ndarray], list]) -> None:
    rng = np.random.default_rng(0)
    background = np.array([7, 8, 9], np.uint8)
    places = set()
    for picture in held_out[0][:40]:
        moved = script.move_shape(picture, background, rng)
        inside, before = (moved != background).any(axis=-1), (picture != picture[0, 0]).any(axis=-1)
        if not (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == picture[0, 0]).all():
            continue  # the shape lies on a corner
        assert inside.sum() == before.sum()
        assert np.array_equal(np.unique(moved[inside], axis=0), np.unique(picture[before], axis=0))
        places.add(tuple(np.argwhere(inside).min(axis=0)))
    assert len(places) > 20


def test_a_record_is_one_picture_and_one_learnt_word(script: ModuleType, held_out: tuple[list[np.ndarray], list]) -> None:
    config = load_config(EXAMPLES / "easy_vqa.yaml").data
    maker = DocumentMaker(config, MODEL_CONFIG, processor())
    pictures, questions = held_out
    for question, answer, number in [questions[0], max(questions, key=lambda q: len(q[0]))]:
        record = script.record(question, answer, script.png(pictures[number]))
        document = maker(RawRecord("r:0", "", "auto", record))
        assert document["error"] is None
        assert len(document["input_ids"]) <= config.sequence_length
        learnt = document["labels"][document["labels"] != IGNORED_LABEL]
        assert processor().decode(learnt, skip_special_tokens=False) == answer + "<|im_end|>"
        assert document["frame_sizes"].tolist() == [[8, 8]] and document["visual"].sum() == 16
        # The pixels themselves: 64 x 64 is not rescaled.
        first = document["pixel_values"][0].reshape(3, 2, 8, 8)[:, 0].transpose(1, 2, 0)
        assert np.allclose((first + 1) / 2 * 255, pictures[number][:8, :8], atol=1e-3)


def test_the_configs_paths_are_what_the_script_writes(script: ModuleType) -> None:
    config = load_config(EXAMPLES / "easy_vqa.yaml")
    assert config.validation is not None
    used = [config.model.path, *(s.path for s in config.data.sources), *(s.path for s in config.validation.data.sources)]
    doc = script.__doc__ or ""
    assert all(Path(path).parent == Path("build/easy_vqa") and Path(path).name in doc for path in used)


def test_the_log_says_what_the_checkpoint_reached() -> None:
    """The last validation of the committed run: >= 90 % of the held-out answers."""
    lines = [json.loads(line) for line in (CHECKPOINT / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    assert last["answers"] == 9673 and last["exact_match"] >= 0.9


def test_the_demo_answers_questions_about_held_out_pictures() -> None:
    demo = load_script("easy_vqa_demo")
    questions = json.loads((CHECKPOINT / "heldout" / "questions.json").read_text(encoding="utf-8"))
    answers = demo.ask(CHECKPOINT, questions)
    right = sum(answer == row["answer"] for answer, row in zip(answers, questions, strict=True))
    assert len(questions) == 81 and right / len(questions) >= 0.9


@pytest.mark.slow
def test_the_checkpoint_sees_and_transformers_answers_the_same(
    script: ModuleType, held_out: tuple[list[np.ndarray], list], tmp_path: Path
) -> None:
    """1024 held-out questions by generation: >= 90 % right, < 67 % (the blind figure) with pictures shuffled; and the tokens of
    the first 512 are transformers'."""
    check = load_script("easy_vqa_check")
    pictures, all_questions = held_out
    order = np.random.default_rng(0).permutation(len(all_questions))
    questions, others = [all_questions[i] for i in order[:1024]], [all_questions[i] for i in order[1024:2048]]
    straight = (script.record(q, a, script.png(pictures[n])) for q, a, n in questions)
    shuffled = (script.record(q, a, script.png(pictures[n])) for (q, a, _), (_, _, n) in zip(questions, others, strict=True))
    script.write_parquet(tmp_path / "straight.parquet", straight)
    script.write_parquet(tmp_path / "shuffled.parquet", shuffled)
    model = check.Qwen3VLMoeForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32")
    right, asked = check.accuracy(model, processor(), tmp_path / "straight.parquet", None)
    lucky, _ = check.accuracy(model, processor(), tmp_path / "shuffled.parquet", None)
    assert asked == 1024 and right / asked >= 0.9 and lucky / asked < 0.67
    assert check.same_as_transformers(CHECKPOINT, model, processor(), tmp_path / "straight.parquet", 512) == 512
