"""The sizes and statistics in a checkpoint's processor files.

preprocessor_config.json (pictures), video_preprocessor_config.json, or both inside processor_config.json as transformers 5
writes them. A key that is missing gets the released Qwen3-VL models' value: transformers' class defaults belong to Qwen2-VL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from qvlmoe_jax.arguments import is_number
from qvlmoe_jax.errors import ProcessorError
from qvlmoe_jax.tokenizer import read_json


@dataclass(frozen=True)
class ImageSettings:
    """Under HF's names; `min_pixels` and `max_pixels` are areas, HF's `size` shortest_edge and longest_edge."""

    min_pixels: int = 65536
    max_pixels: int = 16777216
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = 3  # PIL's number of bicubic
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def replace(self, what: str, **options: Any) -> Self:
        """These settings with some changed; None keeps one.

        Args:
          what: the options' name in an error.
          options: fields, or HF's `size`.
        Raises:
          ProcessorError: an unknown name or an impossible value.
        """
        options = dict(options)
        size = options.pop("size", None) or {}
        known = ("shortest_edge", "longest_edge")
        if not isinstance(size, Mapping) or any(size[key] is not None for key in size if key not in known):
            raise ProcessorError(f"{what}: size is {size!r}, expected an object with shortest_edge and longest_edge")
        edges = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        options = {**edges, **{key: value for key, value in options.items() if value is not None}}
        names = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(options) - names):
            raise ProcessorError(f"{what}: unknown option {unknown[0]!r}, expected one of {', '.join(sorted(names | {'size'}))}")
        changed = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items() if v is not None}
        result = dataclasses.replace(self, **changed)
        result.check(what)
        return result

    def check(self, what: str) -> None:
        """Raises ProcessorError, naming the field, for a value that no picture could be processed with."""
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            value = getattr(self, name)
            if not _is_count(value):
                raise ProcessorError(f"{what}: {name} is {value!r}, expected a positive integer")
        for name in (field.name for field in dataclasses.fields(self) if field.type == "bool"):
            if not isinstance(value := getattr(self, name), bool):  # "no" would count as yes
                raise ProcessorError(f"{what}: {name} is {value!r}, expected true or false")
        if self.min_pixels > self.max_pixels:
            raise ProcessorError(f"{what}: min_pixels = {self.min_pixels} is more than max_pixels = {self.max_pixels}")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or not all(map(is_number, value)):
                raise ProcessorError(f"{what}: {name} is {getattr(self, name)!r}, expected three numbers (red, green, blue)")
        if 0 in self.image_std or not is_number(self.rescale_factor) or not self.rescale_factor:
            raise ProcessorError(
                f"{what}: image_std is {list(self.image_std)} and rescale_factor {self.rescale_factor!r}, "
                "expected numbers other than 0"
            )
        if self.resample not in range(6):
            raise ProcessorError(f"{what}: resample is {self.resample!r}, expected one of Pillow's filters 0 .. 5 (3 = bicubic)")

    @classmethod
    def from_file(cls, section: Mapping[str, Any], what: str) -> Self:
        """Reads one JSON object; keys that nothing here uses are ignored, as transformers does."""
        names = {field.name for field in dataclasses.fields(cls)} | {"size"}
        return cls().replace(what, **{key: value for key, value in section.items() if key in names})


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def options_of(name: str, value: Any) -> Mapping[str, Any]:
    """An argument that holds options by name; None is none.

    Raises:
      ProcessorError: it is something else.
    """
    if not isinstance(value, Mapping | None):
        raise ProcessorError(f"{name} is {value!r:.80}, expected a dict of options")
    return value or {}


@dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """Of `num_frames` and `fps` one; `cap_pixels_per_frame` with `max_video_tokens` limits each frame, off unless asked for."""

    min_pixels: int = 4096
    max_pixels: int = 25165824
    fps: float | None = 2
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    def check(self, what: str) -> None:
        """As for pictures, and the frame counts."""
        super().check(what)
        for name in ("min_frames", "max_frames", "max_video_tokens", "num_frames"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ProcessorError(f"{what}: {name} is {value!r}, expected a positive integer")
        if self.fps is not None and not (is_number(self.fps) and self.fps > 0):
            raise ProcessorError(f"{what}: fps is {self.fps!r}, expected more than 0")

    def sampling(self, *, fps: float | None, num_frames: int | None, do_sample_frames: bool | None) -> VideoSettings:
        """A caller's choice of frames: asking for a number of frames switches the file's fps off, and the other way round.

        Raises:
          ProcessorError: both were given.
        """
        if fps is not None and num_frames is not None:
            raise ProcessorError("fps and num_frames exclude each other; give one of them")
        settings = self.replace("videos", fps=fps, num_frames=num_frames, do_sample_frames=do_sample_frames)
        if num_frames is not None:
            return dataclasses.replace(settings, fps=None)
        return dataclasses.replace(settings, num_frames=None) if fps is not None else settings


def read_settings(directory: str | Path) -> tuple[ImageSettings, VideoSettings]:
    """The settings for pictures and for videos.

    Where a directory describes pictures alone, videos use that file, as in transformers; where it describes neither, both
    are the released models'.
    """
    folder = Path(directory)
    nested = read_json(folder / "processor_config.json") or {}
    picture_file = read_json(folder / "preprocessor_config.json")
    video_file = read_json(folder / "video_preprocessor_config.json")
    for name in ("image_processor", "video_processor"):
        if not isinstance(section := nested.get(name) or {}, Mapping):
            raise ProcessorError(f"processor_config.json: {name} is {section!r:.60}, expected an object")
    pictures = nested.get("image_processor") or picture_file
    videos = nested.get("video_processor") or video_file or picture_file
    return (
        ImageSettings.from_file(pictures or {}, "preprocessor_config.json"),
        VideoSettings.from_file(videos or {}, "video_preprocessor_config.json"),
    )
