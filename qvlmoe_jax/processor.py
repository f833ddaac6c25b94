"""Processor: messages, pictures and videos to what the model reads, without torch or transformers.

Computes what transformers' Qwen3VLProcessor does (models/qwen3_vl/processing_qwen3_vl.py), from the checkpoint's own files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvlmoe_jax.arguments import is_number
from qvlmoe_jax.chat_template import ChatTemplate
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.conversation import read_conversations
from qvlmoe_jax.errors import MediaError, ProcessorError
from qvlmoe_jax.hub import find_source
from qvlmoe_jax.images import load_image
from qvlmoe_jax.patches import in_threads, pixel_rows
from qvlmoe_jax.processor_files import ImageSettings, VideoSettings, options_of, read_settings
from qvlmoe_jax.prompts import PaddingSide, VideoPrompt, VideoTokens, VisionTokens, padded, prompt_ids
from qvlmoe_jax.resize import resize, smart_resize
from qvlmoe_jax.sources import FetchLimits, name_of
from qvlmoe_jax.tokenizer import Tokenizer, read_json
from qvlmoe_jax.videos import load_clip

if TYPE_CHECKING:
    from qvlmoe_jax.batch import Batch


@dataclass(frozen=True)
class Processor:
    """The files of one checkpoint, read.

    Attributes:
      tokenizer, chat_template, images, videos: the parts.
      config: None where the directory has no config.json; then `encode` works and calling does not.
      video_prompt: what becomes of the vision_start ... vision_end pair that the template prints around a video: "replaced" by
        the frames' own pairs, as the released models were trained and transformers 4.57 does, or "wrapped" around them, as
        transformers 5.x does.
      limits: what fetching a URL may cost.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    images: ImageSettings
    videos: VideoSettings
    config: Qwen3VLMoeConfig | None = None
    video_prompt: VideoPrompt = "replaced"
    limits: FetchLimits = FetchLimits()  # noqa: RUF009 - frozen

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        video_prompt: VideoPrompt = "replaced",
        fetch_seconds: float = 30.0,
        fetch_bytes: int = 256 * 2**20,
    ) -> Processor:
        """Reads an HF directory or a converted one (they hold the same processor files).

        Args:
          directory: its path, or a hub repository's `ORG/NAME`, downloaded first if it is not in the hub's cache.
          fetch_seconds, fetch_bytes: the most that one http(s) picture or video may take.
        Raises:
          ProcessorError, ConfigError: a file that is missing, damaged or contradicts another one.
        """
        folder = find_source(directory)
        if not folder.is_dir():
            raise ProcessorError(f"{folder} is not a directory, expected a checkpoint with its tokenizer and processor files")
        _check_video_prompt(video_prompt)
        tokenizer = Tokenizer.from_pretrained(folder)
        source = _template_source(folder, tokenizer)
        images, videos = read_settings(folder)
        config_dict = read_json(folder / "config.json")
        config = None if config_dict is None else Qwen3VLMoeConfig.from_hf(config_dict)
        processor = cls(
            tokenizer=tokenizer,
            chat_template=None if source is None else ChatTemplate(source, tokenizer.special_tokens),
            images=images,
            videos=videos,
            config=config,
            video_prompt=video_prompt,
            limits=FetchLimits(fetch_seconds, fetch_bytes),
        )
        processor._check()
        return processor

    def __call__(
        self,
        conversations: Any,
        add_generation_prompt: bool = True,
        *,
        text_length: int | None = None,
        vision_rows: int | None = None,
        row_patches: int | None = None,
        groups: int = 1,
        **options: Any,
    ) -> Batch:
        """`encode`, and the result as a Batch of static shapes.

        Args:
          text_length, vision_rows, row_patches, groups: as in `Batch.from_hf`; None = the smallest bucket that fits.
          options: `encode`'s.
        """
        from qvlmoe_jax.batch import Batch  # waits for jax

        if self.config is None:
            raise ProcessorError("this checkpoint directory has no config.json, which a Batch needs; encode() works without")
        arrays = self.encode(conversations, add_generation_prompt, **options)
        return Batch.from_hf(
            self.config, **arrays, text_length=text_length, vision_rows=vision_rows, row_patches=row_patches, groups=groups
        )

    def encode(
        self,
        conversations: Any,
        add_generation_prompt: bool = True,
        *,
        padding_side: PaddingSide | None = None,
        video_prompt: VideoPrompt | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        videos_kwargs: Mapping[str, Any] | None = None,
        video_metadata: Sequence[Any] | Mapping[str, Any] | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        do_sample_frames: bool | None = None,
        cap_pixels_per_frame: bool | None = None,
        max_video_tokens: int | None = None,
        **template_options: Any,
    ) -> dict[str, np.ndarray]:
        """Arrays under HF's names, of B conversations padded to the longest, L columns.

        Args:
          conversations: HF's list of messages, or a list of such lists. A content part is `{"type": "text", "text": ...}`,
            `{"type": "image", "image": ...}` (also under url, path, base64, image_url) or `{"type": "video", "video": ...}`.
          add_generation_prompt: ends with the header of the assistant's turn.
          padding_side: None is what tokenizer_config.json says, else "left", as generation needs.
          images_kwargs, videos_kwargs: changes to the settings, under HF's names (`size`, `min_pixels`, `do_resize`, ...).
          video_metadata: of videos given as frames, one dict per video in reading order: `fps`, `frames_indices`.
          fps, num_frames, do_sample_frames: which frames of the videos to look at.
          cap_pixels_per_frame, max_video_tokens: limit each frame of a video.
          template_options: `tools`, `documents`, `continue_final_message` and whatever else the chat template reads.
        Returns:
          input_ids and attention_mask `[B,L]` int64; where there are pictures pixel_values `[patches,C*t*p*p]` float32 and
          image_grid_thw `[images,3]` int64; where there are videos pixel_values_videos and video_grid_thw.
        Raises:
          ProcessorError: the conversations or options; MediaError: a picture or a video.
        """
        if self.chat_template is None:
            raise ProcessorError(
                "this checkpoint directory has no chat template; expected chat_template.jinja, chat_template.json or a "
                "chat_template in tokenizer_config.json"
            )
        _check_video_prompt(video_prompt or self.video_prompt)
        read = read_conversations(conversations)
        prompts = [
            self.chat_template.render(one.messages, add_generation_prompt=add_generation_prompt, **template_options)
            for one in read
        ]
        image_settings = self.images.replace("images_kwargs", **options_of("images_kwargs", images_kwargs))
        video_settings = self.videos.replace(
            "videos_kwargs",
            **{
                "cap_pixels_per_frame": cap_pixels_per_frame,
                "max_video_tokens": max_video_tokens,
                **options_of("videos_kwargs", videos_kwargs),
            },
        ).sampling(fps=fps, num_frames=num_frames, do_sample_frames=do_sample_frames)

        pictures = [source for one in read for source in one.images]
        videos = [source for one in read for source in one.videos]
        metadata = _per_video(video_metadata, len(videos))
        result: dict[str, np.ndarray] = {}
        image_tokens: list[int] = []
        clips: list[VideoTokens] = []
        if pictures:
            resized = in_threads(lambda source: self._resized(source, image_settings)[None], pictures)
            rows, grids = pixel_rows(resized, image_settings)
            result["pixel_values"], result["image_grid_thw"] = rows, grids
            image_tokens = (grids.prod(1) // image_settings.merge_size**2).tolist()
        if videos:
            loaded = [load_clip(v, video_settings, metadata=m, limits=self.limits) for v, m in zip(videos, metadata, strict=True)]
            rows, grids = pixel_rows([clip.frames for clip in loaded], video_settings)
            result["pixel_values_videos"], result["video_grid_thw"] = rows, grids
            merge_unit = video_settings.merge_size**2
            tokens = (grids[:, 1:].prod(1) // merge_unit).tolist()
            clips = [VideoTokens(clip.timestamps, n) for clip, n in zip(loaded, tokens, strict=True)]
        ids = prompt_ids(self.tokenizer, prompts, image_tokens, clips, video_prompt=video_prompt or self.video_prompt)
        side = padding_side or self.tokenizer.padding_side or "left"
        return {**padded(ids, self.tokenizer.pad_token_id, side), **result}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids; `skip_special_tokens=False` keeps the markers of turns, vision and padding."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, ids: Iterable[Any], skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in ids]

    def _resized(self, source: Any, settings: ImageSettings) -> np.ndarray:
        image, name = load_image(source, self.limits), name_of(source, "picture")
        factor = settings.patch_size * settings.merge_size
        height, width = image.height, image.width
        if settings.do_resize:
            height, width = smart_resize(
                height, width, factor=factor, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels, name=name
            )
        elif height % factor or width % factor:
            raise MediaError(f"{name} is {width} x {height} and do_resize is off; expected multiples of {factor}")
        return resize(image, height, width, settings.resample)

    def _check(self) -> None:
        """The vocabulary and the processor files against config.json."""
        if self.config is None:
            return
        marks = VisionTokens.of(self.tokenizer)
        for token, key in ((marks.image, "image_token_id"), (marks.video, "video_token_id")):
            expected = getattr(self.config, key)
            if (found := self.tokenizer.id_of(token)) not in (expected, None):
                raise ProcessorError(
                    f"the tokenizer gives {token} the id {found}, but config.json's {key} is {expected}; "
                    "expected files of the same checkpoint"
                )
        vision = self.config.vision_config
        for what, settings in (("preprocessor_config.json", self.images), ("video_preprocessor_config.json", self.videos)):
            for name, expected in (
                ("patch_size", vision.patch_size),
                ("temporal_patch_size", vision.temporal_patch_size),
                ("merge_size", vision.spatial_merge_size),
            ):
                if getattr(settings, name) != expected:
                    raise ProcessorError(
                        f"{what}: {name} is {getattr(settings, name)}, but config.json's vision_config has {expected}; "
                        "expected files of the same checkpoint"
                    )


def _check_video_prompt(video_prompt: Any) -> None:
    if video_prompt not in ("replaced", "wrapped"):
        raise ProcessorError(f"video_prompt is {video_prompt!r}, expected 'replaced' or 'wrapped'")


def _template_source(folder: Path, tokenizer: Tokenizer) -> str | None:
    """transformers' order: chat_template.jinja, chat_template.json, then tokenizer_config.json (a text, or named texts)."""
    if (file := folder / "chat_template.jinja").is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ProcessorError(f"{file} is not UTF-8 text ({error}); copy the checkpoint's own file") from error
    for found in (read_json(folder / "chat_template.json") or {}, tokenizer.config):
        source = found.get("chat_template")
        if isinstance(source, list):
            try:
                source = {entry["name"]: entry["template"] for entry in source}
            except (TypeError, KeyError) as error:
                raise ProcessorError(
                    f"{folder}: chat_template holds {source!r:.60}, expected a text, or objects with a name and a template"
                ) from error
        if isinstance(source, Mapping):
            source = source.get("default")
        if source:
            return source
    return None


def _per_video(metadata: Any, count: int) -> list[Mapping[str, Any] | None]:
    entries: Any = [metadata] if isinstance(metadata, Mapping) else metadata or [None] * count
    if isinstance(entries, (list, tuple)) and all(isinstance(entry, (list, tuple)) for entry in entries):
        entries = [one for entry in entries for one in entry]  # HF's other spelling: a list per conversation
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping | None) for entry in entries):
        raise ProcessorError(f"video_metadata is {metadata!r:.80}, expected a list with a dict for each video")
    if len(entries) != count:
        raise ProcessorError(f"video_metadata has {len(entries)} entries for {count} videos; expected one each")
    for entry in entries:
        fps = (entry or {}).get("fps")
        if fps is not None and not (is_number(fps) and fps >= 0):
            raise ProcessorError(f"video_metadata: fps is {fps!r}, expected a number, or None where it is not known")
    return list(entries)
