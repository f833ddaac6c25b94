"""A record -> a document: token ids, labels, positions and patches of one conversation, ready to be packed.

n tokens, N patches, W numbers per patch, F frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qvlmoe_jax.batch import Media
from qvlmoe_jax.command_line import one_line
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.errors import QvlmoeError
from qvlmoe_jax.positions import mrope_positions
from qvlmoe_jax.processor import Processor
from train.data_config import DataConfig
from train.formats import Message, RecordError, to_messages
from train.labels import CONTROL_TOKENS, TurnTokens, assistant_labels
from train.media import load_media
from train.records import RawRecord

Document = dict[str, Any]
"""`name`, `error` (None, or why the record cannot be used and then nothing else) and numpy arrays: `input_ids [n]`,
`labels [n]`, `position_ids [3,n]`, `visual [n]` (bool), `frame_sizes [F,2]` in patches, `pixel_values [N,W]`, in the order of
their tokens."""


class DocumentMaker:
    """`RawRecord -> Document`. Picklable when the processor is; workers get a copy."""

    def __init__(self, config: DataConfig, model_config: Qwen3VLMoeConfig, processor: Processor):
        self._config, self._model_config, self._processor = config, model_config, processor
        self._turns = TurnTokens.of(processor.tokenizer)

    def __call__(self, record: RawRecord) -> Document:
        try:
            messages = to_messages(record)
            _refuse_control_tokens(messages)
            return {"name": record.name, "error": None, **self._encode(load_media(messages, record.root))}
        except (RecordError, QvlmoeError) as error:
            return {"name": record.name, "error": one_line(error)}
        except Exception as error:  # a fault of this program: to skip the record would hide it
            error.add_note(f"while reading the record {record.name}")
            raise

    def _encode(self, messages: list[Message]) -> Document:
        config, vision = self._config, self._model_config.vision_config
        arrays = self._processor.encode([messages], add_generation_prompt=False)
        ids = np.asarray(arrays["input_ids"])[0]
        if len(ids) > config.sequence_length:
            raise RecordError(f"has {len(ids)} tokens, more than sequence_length = {config.sequence_length}")
        kinds = np.zeros(len(ids), np.int8)
        kinds[ids == self._model_config.image_token_id] = 1
        kinds[ids == self._model_config.video_token_id] = 2
        media = Media.of(
            self._model_config,
            arrays.get("pixel_values"),
            arrays.get("image_grid_thw"),
            arrays.get("pixel_values_videos"),
            arrays.get("video_grid_thw"),
        )
        frames, _ = media.assign(kinds[None], np.ones((1, len(ids)), bool), vision.merge_unit)
        largest = max((frame.num_patches for frame in frames), default=0)
        if largest > config.row_patches or (frames and not config.vision_rows):
            room = f"row_patches = {config.row_patches}" if config.vision_rows else "vision_rows = 0"
            raise RecordError(f"has a frame of {largest} patches, more than {room} allows; resize it or raise the limit")
        merge = vision.spatial_merge_size
        labels = assistant_labels(ids, self._turns, label_newline=config.label_newline)
        if not np.any(labels >= 0):
            raise RecordError("has no assistant token, so there is nothing to learn")
        patches = [frame.patches for frame in frames] or [np.zeros((0, vision.patch_width))]
        return {
            "input_ids": ids.astype(np.int32),
            "labels": labels,
            "position_ids": mrope_positions(kinds, [(f.height // merge, f.width // merge) for f in frames]),
            "visual": kinds != 0,
            "frame_sizes": np.array([(f.height, f.width) for f in frames], np.int32).reshape(-1, 2),
            "pixel_values": np.concatenate(patches).astype(np.float32),
        }


def _refuse_control_tokens(messages: list[Message]) -> None:
    """Text that spells a control token would be read as one: a user could write an assistant turn, or move the pictures."""
    for i, message in enumerate(messages):
        for item in message["content"]:
            if item["type"] == "text" and "<|" in item["text"]:
                for token in CONTROL_TOKENS:
                    if token in item["text"]:
                        raise RecordError(f"turn {i} contains the control token {token} in its text")
