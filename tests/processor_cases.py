"""Pictures, videos and conversations that the processor and transformers' both see. Deterministic integer arithmetic makes them.

`tests/make_processor_goldens.py` stores what transformers makes of them, `tests/test_processor_*.py` compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VIDEO_FILES = Path(__file__).parent / "data" / "videos"

SAMPLES = 4096
"""Values of `pixel_values` stored per case, spread over all of it."""


def clip(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """`[frames,height,width,3]` uint8: ramps with hard edges and noise, a little different in each frame."""
    t, y, x, c = np.meshgrid(*(np.arange(n, dtype=np.uint32) for n in (frames, height, width, 3)), indexing="ij", sparse=True)
    key = x * np.uint32(73856093) ^ y * np.uint32(19349663) ^ (c + 3 * t + np.uint32(seed + 1)) * np.uint32(83492791)
    key = (key ^ (key >> np.uint32(13))) * np.uint32(1274126177)
    ramp = (3 * x + 5 * y + 40 * c + 11 * t) // 4 % 192
    return (ramp + (key >> np.uint32(16)) % 64).astype(np.uint8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """One frame of `clip` as a PIL picture."""
    return Image.fromarray(clip(1, height, width, seed)[0])


def sampled_levels(values: np.ndarray) -> np.ndarray:
    """`SAMPLES` grey levels (0..255, uint8) of pixel values normalised with mean and std 0.5."""
    at = np.arange(SAMPLES, dtype=np.int64) * 2654435761 % values.size
    return np.round(values.reshape(-1)[at] * 127.5 + 127.5).astype(np.uint8)


PICTURE_SIZES = (  # (height, width)
    *((1, 1), (1, 2), (2, 1), (1, 200), (200, 1), (3, 500), (2, 400), (7, 5), (16, 48), (48, 16)),
    *((31, 31), (32, 32), (33, 33), (80, 80), (100, 655), (112, 112), (128, 512), (224, 224), (240, 272), (255, 257)),
    *((256, 256), (257, 255), (272, 272), (304, 304), (336, 336), (320, 240), (333, 517), (360, 640), (480, 640), (511, 513)),
    *((512, 512), (528, 528), (560, 592), (600, 800), (640, 480), (64, 4096), (4096, 64), (20, 4000), (700, 1001), (768, 1024)),
    *((1000, 1000), (1008, 1040), (1080, 1920), (1920, 1080), (1200, 1600), (1234, 987), (1536, 1552)),
)
LARGE_PICTURE_SIZES = ((4096, 4096), (4100, 4100), (4112, 4080), (3000, 8000), (20000, 100), (100, 20000), (5000, 4001))


@dataclass(frozen=True)
class Case:
    """options: `Processor.encode`'s, which are HF's names."""

    conversations: Any
    options: dict[str, Any] = field(default_factory=dict)


def _ask(*parts: Any, text: str = "What is this?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _image(height: int, width: int, seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(height, width, seed)}


def _video(frames: Any) -> dict[str, Any]:
    return {"type": "video", "video": frames}


def picture_case(size: tuple[int, int]) -> Case:
    """One picture of that size and a question."""
    return Case(_ask(_image(*size)))


def _meta(fps: float, frames: int) -> dict[str, Any]:
    return {"video_metadata": [{"fps": fps, "total_num_frames": frames, "frames_indices": list(range(frames))}]}


NOT_IN_457 = ("tiny_frames", "two_pixel_frames", "capped_720p", "capped_64_tokens")
"""Videos that transformers 4.57 refuses (a side below 32) or whose option it lacks."""


def _file(name: str) -> dict[str, Any]:
    return _video(str(VIDEO_FILES / name))


def video_cases() -> dict[str, Case]:
    """Arrays, lists of frames and files; each of the sampling options."""
    ask = _ask
    presampled = {"video_metadata": [{"fps": 25.0, "total_num_frames": 100, "frames_indices": [0, 13, 60, 99, 100]}]}
    return {
        "unknown_fps": Case(ask(_video(clip(61, 48, 80)))),
        "unknown_fps_short": Case(ask(_video(clip(8, 64, 96)))),
        "two_frames": Case(ask(_video(clip(2, 70, 90))), {"do_sample_frames": False}),
        "three_frames": Case(ask(_video(clip(3, 70, 90))), {"do_sample_frames": False}),
        "odd_frames_all": Case(ask(_video(clip(7, 100, 60))), {"do_sample_frames": False}),
        "five_frames_all": Case(ask(_video(clip(5, 272, 304))), {"do_sample_frames": False}),
        "fps_30": Case(ask(_video(clip(91, 40, 64))), _meta(30.0, 91)),
        "fps_ntsc": Case(ask(_video(clip(150, 36, 64))), _meta(30000 / 1001, 150)),
        "fps_1_asked": Case(ask(_video(clip(240, 32, 48))), {"fps": 1, **_meta(24.0, 240)}),
        "num_frames_5": Case(ask(_video(clip(40, 64, 64))), {"num_frames": 5, **_meta(10.0, 40)}),
        "more_than_768": Case(ask(_video(clip(2000, 32, 32))), _meta(1.0, 2000)),
        "tiny_frames": Case(ask(_video(clip(6, 4, 9))), {"do_sample_frames": False}),
        "two_pixel_frames": Case(ask(_video(clip(4, 2, 2))), {"do_sample_frames": False}),
        "wide": Case(ask(_video(clip(4, 32, 3200))), {"do_sample_frames": False}),
        "uncapped_720p": Case(ask(_video(clip(6, 720, 1280))), {"do_sample_frames": False, "cap_pixels_per_frame": False}),
        "capped_720p": Case(ask(_video(clip(6, 720, 1280))), {"do_sample_frames": False, "cap_pixels_per_frame": True}),
        "capped_64_tokens": Case(
            ask(_video(clip(4, 480, 640))),
            {"do_sample_frames": False, "cap_pixels_per_frame": True, "max_video_tokens": 64},
        ),
        "over_the_limit": Case(
            ask(_video(clip(9, 240, 400))),
            {"do_sample_frames": False, "videos_kwargs": {"size": {"shortest_edge": 4096, "longest_edge": 200000}}},
        ),
        "presampled": Case(ask(_video(clip(5, 50, 50))), {"do_sample_frames": False, **presampled}),
        "list_of_pictures": Case(ask(_video([picture(60, 80, seed) for seed in range(9)]))),
        "file_h264": Case(ask(_file("h264_2997fps_75frames.mp4"))),
        "file_odd": Case(ask(_file("mpeg4_25fps_13frames.mp4"))),
        "file_all_frames": Case(ask(_file("mpeg4_25fps_13frames.mp4")), {"do_sample_frames": False}),
        "file_slow": Case(ask(_file("mpeg4_1fps_9frames.avi"))),
        "file_num_frames": Case(ask(_file("h264_2997fps_75frames.mp4")), {"num_frames": 6}),
        "two_videos": Case(
            ask(_video(clip(12, 48, 64)), _video(clip(30, 64, 48, seed=5)), text="Compare them."),
            {"video_metadata": [_meta(6.0, 12)["video_metadata"][0], _meta(10.0, 30)["video_metadata"][0]]},
        ),
    }


_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Reads "the" weather <now> & here, ü',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def _text(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _parts(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}


def chat_cases() -> dict[str, Case]:
    """Transcripts of one to six turns: text of many scripts, pictures anywhere, tools, batches padded on either side."""
    scripts = "naïve café e\u0301 — 中文字符 русский العربية हिन्दी 🎉👩‍👩‍👧 \t\r\n  12345 don't I'LL  \n\n\nend  "
    code = "def f(x):\n\treturn {'a': x**2}  # <|im_start|>?\n```<think>ok</think>```"
    turns = [
        _text("system", "You answer in one word."),
        _parts("user", _image(96, 128), "What is this?"),
        _text("assistant", "Noise."),
        _parts("user", "And these?", _image(64, 64, 1), "first", _image(300, 200, 2), "second"),
        _parts("assistant", "More", " noise."),
        _text("user", "Sure?"),
        _text("assistant", "Yes."),
        _parts("user", _video(clip(8, 40, 56)), "Then this?"),
        _text("assistant", "Moving noise."),
        _text("user", scripts),
        _text("assistant", code),
        _parts("user", "Last one.", _image(32, 500, 3)),
    ]
    tool_calls = [
        _text("system", "Use tools."),
        _text("user", "Weather in Paris and Rome?"),
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "note": "é <b>"}}},
                {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            ],
        },
        _parts("tool", "Rain"),
        _parts("tool", "See picture:", _image(64, 96)),
        _text("assistant", "Rain and sun."),
        _text("user", "Thanks."),
    ]
    short, long = [_text("user", "Hi")], turns[:4]
    cases = {f"{n}_messages": Case(turns[:n]) for n in (2, 4, 6, 8, 10, 12)}
    return {
        "one_turn": Case([_text("user", "Hello!")]),
        "scripts": Case([_text("user", scripts), _text("assistant", scripts), _text("user", code)]),
        "empty_text": Case([_text("user", "")]),
        "no_generation_prompt": Case(turns[:3], {"add_generation_prompt": False}),
        "continue_final_message": Case(turns[:3], {"add_generation_prompt": False, "continue_final_message": True}),
        **cases,
        "tools": Case(tool_calls, {"tools": [_WEATHER]}),
        "tools_without_system": Case([_parts("user", _image(64, 64), "Where?")], {"tools": [_WEATHER]}),
        "vision_ids": Case(turns[:8], {"add_vision_id": True}),
        "image_url": Case([_parts("user", {"type": "image_url", "image_url": {"url": picture(64, 64)}}, "?")]),
        "batch_left": Case([short, long, turns[:8]], {"padding_side": "left"}),
        "batch_right": Case([turns[:8], short, long], {"padding_side": "right"}),
        "batch_of_text": Case([short, [_text("user", scripts)]], {"padding_side": "left"}),
    }
