"""The demo's own parts: its prompt against Hugging Face's tokenizer and image processor, its verdict, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The modules of examples/, which import each other as scripts do."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return {name: __import__(name) for name in ("demo", "prompt", "tiny_checkpoint")}
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def checkpoint(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    scripts["tiny_checkpoint"].write_checkpoint(directory)
    return directory


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_the_checkpoint_is_laid_out_like_the_hubs(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(shards) == 3
    assert sorted(set(index["weight_map"].values())) == shards


def test_the_checkpoint_is_the_same_every_time(scripts: dict[str, ModuleType], checkpoint: Path, tmp_path: Path) -> None:
    scripts["tiny_checkpoint"].write_checkpoint(tmp_path)
    for file in checkpoint.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


@pytest.mark.parametrize("question", ["What animal is this?", "Qu'est-ce que c'est ?\n123 日本語 <|im_end|> 🐈"])
def test_the_prompt_has_transformers_ids(scripts: dict[str, ModuleType], checkpoint: Path, question: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    inputs, _ = scripts["prompt"].encode(checkpoint, picture(256, 256), question)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 64))["input_ids"]
    np.testing.assert_array_equal(inputs["input_ids"], [ids])


@pytest.mark.parametrize("size", [(320, 256), (256, 192), (50, 1000), (2000, 37), (333, 777)], ids="{0[0]}x{0[1]}".format)
def test_the_pixels_are_transformers(scripts: dict[str, ModuleType], checkpoint: Path, size: tuple[int, int]) -> None:
    """Bit for bit where nothing is resized; else one grey level, since Pillow 13 may resize vertically first."""
    transformers = pytest.importorskip("transformers")
    image = picture(*size)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    pixels, grid = scripts["prompt"].patchify(image, settings)
    theirs = transformers.AutoImageProcessor.from_pretrained(checkpoint)(images=[image], return_tensors="np")
    np.testing.assert_array_equal(grid, theirs["image_grid_thw"])
    grey_levels = np.abs(pixels - theirs["pixel_values"]).max() * 127.5
    assert grey_levels <= (0 if size == (320, 256) else 1.001)


@pytest.mark.parametrize("limits", [(65536, 16777216), (4096, 30000)])
def test_sizes_are_transformers(scripts: dict[str, ModuleType], limits: tuple[int, int]) -> None:
    smart = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    bounds = {"factor": 32, "min_pixels": limits[0], "max_pixels": limits[1]}
    rng = np.random.default_rng(1)
    for height, width in rng.integers(16, 600, (300, 2)).tolist():
        assert scripts["prompt"].smart_size(height, width, **bounds) == smart(height, width, **bounds)


def test_the_verdict_fails_what_is_too_far_off(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    report = scripts["demo"].report_parity
    assert report("x", {"a": 1e-6, "b": 9e-5})
    assert not report("x", {"a": 1e-6, "b": 1.1e-4})
    assert not report("x", {"a": float("nan")})
    assert capsys.readouterr().out.count("TOO FAR OFF") == 2


def test_stored_logits_notice_one_wrong_number(scripts: dict[str, ModuleType]) -> None:
    demo = scripts["demo"]
    golden = np.load(demo.GOLDEN)
    logits = np.random.default_rng(0).normal(size=(golden["logits"].shape[0], 512)).astype(np.float32)
    stored = {"logits": logits[:, :: demo.GOLDEN_STRIDE], "logsumexp": demo.logsumexp(logits)}
    assert demo.golden_error(logits, stored) == 0
    logits[3, 5] += 4  # an entry that is not stored
    assert demo.golden_error(logits, stored) > demo.BOUND


def test_a_missing_picture_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path), "--image", "no-such.png"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("demo: ") and "no-such.png" in result.stderr and len(result.stderr.splitlines()) == 1
