"""A video to uint8 frames and their times: which frames are looked at, decoding, the size they get."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvlmoe_jax.errors import MediaError
from qvlmoe_jax.images import load_image, rgb_array
from qvlmoe_jax.processor_files import VideoSettings
from qvlmoe_jax.resize import resize, smart_resize_video
from qvlmoe_jax.sources import FetchLimits, name_of, open_source

UNKNOWN_FPS = 24.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """frames: `[T,H,W,3]` uint8, resized. timestamps: seconds in the source of each temporal patch."""

    frames: np.ndarray
    timestamps: list[float]


def load_clip(
    source: Any, settings: VideoSettings, *, metadata: Mapping[str, Any] | None = None, limits: FetchLimits | None = None
) -> Clip:
    """The frames that `settings` ask for.

    Args:
      source: a path, URL or bytes of a video file; an array `[T,H,W,3]` uint8; a list of pictures (anything `load_image` takes).
      metadata: of frames: `fps`, and `frames_indices` where they were sampled already (HF's VideoMetadata). A file brings
        its own.
    Raises:
      MediaError: unreadable, fewer than two frames, frames of unequal size, options that exclude each other.
    """
    if isinstance(source, (list, tuple)) or (hasattr(source, "__array__") and hasattr(source, "shape")):
        return _from_frames(source, settings, metadata or {}, limits)
    return _from_file(source, settings, limits or FetchLimits())


def sample_frames(total: int, fps: float | None, settings: VideoSettings) -> np.ndarray:
    """The indices of the frames to look at, `[n]` in 0 .. total-1.

    `num_frames` of them, or `settings.fps` a second within `min_frames` .. `max_frames`; evenly spaced, the first and last
    included. models/qwen3_vl/video_processing_qwen3_vl.py, `sample_frames`.
    """
    if not settings.do_sample_frames:
        return np.arange(total)
    count = settings.num_frames
    if count is None and settings.fps is not None:
        count = int(total / (fps or UNKNOWN_FPS) * settings.fps)
        count = min(max(count, settings.min_frames), settings.max_frames, total)
    if count is None:
        count = min(max(total, settings.min_frames), settings.max_frames)
    return np.linspace(0, total - 1, count).round().astype(int)


def timestamps(indices: Sequence[int] | np.ndarray, fps: float | None, temporal_patch_size: int) -> list[float]:
    """Seconds: the mean of the first and last frame of each temporal patch; the last frame is repeated to fill it.

    models/qwen3_vl/processing_qwen3_vl.py, `_calculate_timestamps`.
    """
    t = temporal_patch_size
    seconds = [int(i) / (fps or UNKNOWN_FPS) for i in indices]
    seconds += [seconds[-1]] * (-len(seconds) % t)
    return [(seconds[i] + seconds[i + t - 1]) / 2 for i in range(0, len(seconds), t)]


def frame_size(num_frames: int, height: int, width: int, settings: VideoSettings, name: str = "the clip") -> tuple[int, int]:
    """Height and width that every frame of a clip is resized to.

    With `cap_pixels_per_frame` a frame gets at most `max_video_tokens` tokens and its even share of the clip's budget
    (`Qwen3VLVideoProcessor.resize`).
    """
    factor = settings.patch_size * settings.merge_size
    if not settings.do_resize:
        if height % factor or width % factor:
            raise MediaError(f"{name} is {width} x {height} and do_resize is off; expected multiples of {factor}")
        return height, width
    max_pixels = settings.max_pixels
    if settings.cap_pixels_per_frame:
        cap = settings.max_video_tokens * factor * factor
        max_pixels = num_frames * max(min(cap, max_pixels // num_frames), int(settings.min_pixels * 1.05))
    return smart_resize_video(
        num_frames,
        height,
        width,
        factor=factor,
        temporal_factor=settings.temporal_patch_size,
        min_pixels=settings.min_pixels,
        max_pixels=max_pixels,
        name=name,
    )


def _from_frames(source: Any, settings: VideoSettings, metadata: Mapping[str, Any], limits: FetchLimits | None) -> Clip:
    if isinstance(source, (list, tuple)):
        frames: Any = [load_image(frame, limits) for frame in source]
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise MediaError(f"the clip's frames differ in size: {sorted(sizes)[:4]} (width, height); expected one size")
    else:
        frames = rgb_array(source, dims=4)
    if not len(frames):
        raise MediaError("the clip has no frames; expected at least two")
    fps = metadata.get("fps")
    if fps is None:
        _tell_once("clips came as frames without their fps, taken for %g frames a second: pass video_metadata")
    chosen = sample_frames(len(frames), fps, settings)
    source_index = np.arange(len(frames))
    if not settings.do_sample_frames and metadata.get("frames_indices") is not None:
        source_index = np.asarray(metadata["frames_indices"])
        if source_index.shape != (len(frames),) or source_index.dtype.kind not in "iuf":
            raise MediaError(
                f"video_metadata has {source_index.size} frames_indices for {len(frames)} frames, expected a number for each"
            )
    pictures = (frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in (frames[i] for i in chosen))
    return _resized(pictures, source_index[chosen], fps, settings, "the clip")


def _from_file(source: Any, settings: VideoSettings, limits: FetchLimits) -> Clip:
    import av  # half a second, and only video files need it
    from av.error import FFmpegError

    stream = open_source(source, limits)
    name = name_of(source, "video")

    def opened(use: Callable[[Any], Any]) -> Any:
        if not isinstance(stream, Path):
            stream.seek(0)
        try:
            with av.open(str(stream) if isinstance(stream, Path) else stream) as container:
                if not container.streams.video:
                    raise MediaError(f"{name} has no video stream; expected a video file")
                container.streams.video[0].thread_type = "AUTO"
                return use(container)
        except (FFmpegError, IndexError) as error:
            raise MediaError(f"{name} cannot be decoded: {error}; expected a whole, undamaged video") from error

    def facts(container: Any) -> tuple[int, float | None]:
        video = container.streams.video[0]
        return video.frames, float(video.average_rate) if video.average_rate else None

    total, fps = opened(facts)
    if fps is None:
        _tell_once("a video does not say its fps, taken for %g frames a second")

    def decode(container: Any) -> Clip:
        chosen = sample_frames(total, fps, settings)
        return _resized(_decoded(container, chosen), chosen, fps, settings, name)

    if total:  # the header's claim; where the frames end earlier, counted below
        try:
            return opened(decode)
        except _FewerFrames:
            pass
    claimed, total = total, opened(lambda container: sum(1 for _ in container.decode(video=0)))
    if not total:
        raise MediaError(f"{name} holds no frames; expected a whole, undamaged video")
    if total < claimed:
        logger.warning("%s holds %d frames of the %d that its header counts; is it cut off?", name, total, claimed)
    return opened(decode)


def _upright(frame: Any) -> np.ndarray:
    """RGB, turned as the container's display matrix says (phones film sideways); degrees are counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))


class _FewerFrames(Exception):
    """The container's header counts more frames than there are."""


@functools.cache
def _tell_once(message: str) -> None:
    logger.warning(message, UNKNOWN_FPS)


def _decoded(container: Any, chosen: np.ndarray) -> Iterator[Image.Image]:
    """The chosen frames (ascending, with repetitions), each converted to RGB once."""
    wanted = iter(chosen.tolist())
    index = next(wanted, None)
    for i, frame in enumerate(container.decode(video=0)):
        if index is None:
            return
        if i != index:
            continue
        picture = Image.fromarray(_upright(frame))
        while index == i:
            yield picture
            index = next(wanted, None)
    if index is not None:
        raise _FewerFrames


def _resized(pictures: Iterable[Image.Image], indices: np.ndarray, fps: float | None, settings: VideoSettings, name: str) -> Clip:
    """Resizes one by one, so that a long clip never lies in memory at its full size."""
    frames = None
    height = width = 0
    for i, picture in enumerate(pictures):
        if frames is None:
            height, width = frame_size(len(indices), picture.height, picture.width, settings, name)
            frames = np.empty((len(indices), height, width, 3), np.uint8)
        frames[i] = resize(picture, height, width, settings.resample)
    assert frames is not None
    return Clip(frames, timestamps(indices, fps, settings.temporal_patch_size))
