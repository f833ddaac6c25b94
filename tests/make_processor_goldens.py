"""Writes what transformers' Qwen3VLProcessor makes of tests/processor_cases.py. Needs torch and torchvision's Python files.

    pip download --no-deps torchvision==0.28.0 && unzip -d TORCHVISION torchvision-*.whl
    pip install --no-deps --target PILLOW pillow==12.0.0
    PYTHONPATH=TORCHVISION python -m tests.make_processor_goldens --older-pillow PILLOW

Under transformers 5 it writes data/processor_goldens.npz: per case ids, grids and `SAMPLES` grey levels of the pixel values;
per picture size the SHA-256 of Pillow 12's own bicubic resize; tables of HF's size and sampling functions. Under 4.57 (an
environment as tests/older_transformers.py describes) it writes data/processor_goldens_457.npz: ids and grids, whose video
prompt is that of the released models. `--videos` writes the small video files anew; their frames depend on FFmpeg.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests import processor_cases, qwen_tokenizer
from tests.processor_cases import Case

DATA = Path(__file__).parent / "data"
FILE = DATA / "processor_goldens.npz"
FILE_457 = DATA / "processor_goldens_457.npz"
TEMPLATE_OPTIONS = ("tools", "add_vision_id", "add_generation_prompt", "continue_final_message")


def main() -> None:
    """Runs the reference on every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--older-pillow", type=Path, help="a directory that holds Pillow 12")
    parser.add_argument("--videos", action="store_true", help="write the video files and stop")
    arguments = parser.parse_args()
    if arguments.videos:
        write_video_files()
        return
    import transformers

    from tests import hf_processor

    older = transformers.__version__.startswith("4.")
    arrays: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    with tempfile.TemporaryDirectory() as directory:
        hf = hf_processor.processor(qwen_tokenizer.build(Path(directory)))
        hf.video_processor.fetch_videos = hf_processor.fetch_with_pyav
        for name, case in all_cases():
            if older and name.removeprefix("video/") in processor_cases.NOT_IN_457:
                continue
            for key, value in reference(hf, case, older=older).items():
                if key.startswith("pixel_values"):
                    if not older:
                        arrays[f"{name}/{key}"] = processor_cases.sampled_levels(value)
                        arrays[f"{name}/{key}.shape"] = np.array(value.shape)
                elif key in ("input_ids", "attention_mask") or key.endswith("grid_thw"):
                    arrays[f"{name}/{key}"] = value.astype(np.int32 if key == "input_ids" or "grid" in key else np.int8)
            print(name, flush=True)
    if not older:
        arrays |= hf_processor.tables() | pillow_hashes(arrays, arguments.older_pillow)
    file = FILE_457 if older else FILE
    np.savez_compressed(file, **arrays)
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB from transformers {transformers.__version__}")


def all_cases() -> Iterator[tuple[str, Case]]:
    """Pictures of all sizes, videos, conversations, under the names they are stored by."""
    for size in (*processor_cases.PICTURE_SIZES, *processor_cases.LARGE_PICTURE_SIZES):
        yield "picture/{}x{}".format(*size), processor_cases.picture_case(size)
    yield from ((f"video/{name}", case) for name, case in processor_cases.video_cases().items())
    yield from ((f"chat/{name}", case) for name, case in processor_cases.chat_cases().items())


def reference(hf: Any, case: Case, *, older: bool) -> dict[str, np.ndarray]:
    """transformers' own arrays; its options have our names, except that its class default of fps must be switched off."""
    options = dict(case.options)
    template = {key: options.pop(key) for key in TEMPLATE_OPTIONS if key in options}
    template.setdefault("add_generation_prompt", True)
    hf.video_processor.max_video_tokens = options.pop("max_video_tokens", 768)  # the call's own value is not read
    hf.video_processor.fps = None if "num_frames" in options else 2
    hf.tokenizer.padding_side = options.pop("padding_side", "left")
    videos = {**options.pop("videos_kwargs", {}), **options}
    if older:
        videos.pop("cap_pixels_per_frame", None)  # its only behaviour is False
    conversations = [case.conversations] if isinstance(case.conversations[0], dict) else case.conversations
    text = [hf.apply_chat_template(one, tokenize=False, **template) for one in conversations]
    pictures = [source for one in conversations for source in _sources(one, ("image", "image_url"))]
    clips = [source for one in conversations for source in _sources(one, ("video",))]
    result = hf(text=text, images=pictures or None, videos=clips or None, videos_kwargs=videos, padding=True, return_tensors="pt")
    return {key: value.numpy() for key, value in result.items() if hasattr(value, "numpy")}


def _sources(conversation: Any, keys: tuple[str, ...]) -> list[Any]:
    parts = [part for message in conversation if isinstance(message["content"], list) for part in message["content"]]
    found = [part[key] for part in parts for key in keys if key in part]
    return [one["url"] if isinstance(one, dict) else one for one in found]


def pillow_hashes(arrays: dict[str, Any], older_pillow: Path | None) -> dict[str, Any]:
    """`pillow/HxW`: SHA-256 of the picture resized by Pillow <= 12 in one call, to the size that HF's grid says."""
    if older_pillow is None:
        raise SystemExit("--older-pillow is needed under transformers 5")
    jobs = []
    for h, w in (*processor_cases.PICTURE_SIZES, *processor_cases.LARGE_PICTURE_SIZES):
        _, rows, columns = arrays[f"picture/{h}x{w}/image_grid_thw"][0]
        jobs.append((h, w, int(rows) * 16, int(columns) * 16))
    code = (
        "import hashlib, PIL\nfrom PIL import Image\nfrom tests.processor_cases import picture\n"
        "assert int(PIL.__version__.split('.')[0]) <= 12\n"
        f"for h, w, H, W in {jobs}:\n"
        "    print(hashlib.sha256(picture(h, w).resize((W, H), Image.Resampling.BICUBIC).tobytes()).hexdigest())\n"
    )
    path = os.pathsep.join([str(older_pillow.resolve()), os.getcwd()])
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    digests = run.stdout.split()
    return {f"pillow/{h}x{w}": np.array(digest) for (h, w, _, _), digest in zip(jobs, digests, strict=True)}


def write_video_files() -> None:
    """Small clips: two codecs, three rates, one whose header does not count its frames."""
    import av

    processor_cases.VIDEO_FILES.mkdir(exist_ok=True)
    for name, codec, rate, frames, size in (
        ("h264_2997fps_75frames.mp4", "libx264", "30000/1001", 75, (48, 80)),
        ("mpeg4_25fps_13frames.mp4", "mpeg4", "25", 13, (64, 48)),
        ("mpeg4_1fps_9frames.avi", "mpeg4", "1", 9, (32, 64)),
        ("h264_10fps_31frames_uncounted.mkv", "libx264", "10", 31, (48, 64)),
    ):
        with av.open(str(processor_cases.VIDEO_FILES / name), "w") as container:
            stream: Any = container.add_stream(codec, rate=Fraction(rate))
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = 40_000
            for i in range(frames):
                y, x = np.mgrid[: size[0], : size[1]]
                level = (3 * x + 2 * y + 5 * i) % 256
                rgb = np.stack([level, np.roll(level, 9 * i, 1), np.full_like(level, 255 * i // frames)], -1).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
            container.mux(stream.encode())


if __name__ == "__main__":
    main()
