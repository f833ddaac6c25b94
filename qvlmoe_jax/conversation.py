"""HF's messages: which part is a picture or a video, and where its data is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qvlmoe_jax.errors import ProcessorError
from qvlmoe_jax.sources import base64_bytes

_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
_VIDEO_KEYS = ("video", "url", "path", "base64")
_ROLES_HINT = 'a conversation is a list of {"role": ..., "content": ...} messages'


@dataclass
class Conversation:
    """The messages as the chat template gets them, and their pictures and videos in reading order."""

    messages: list[Mapping[str, Any]]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


def read_conversations(conversations: Any) -> list[Conversation]:
    """One conversation or a list of them.

    Raises:
      ProcessorError: something that is neither, or a picture part without a picture.
    """
    if not isinstance(conversations, (list, tuple)) or not conversations:
        raise ProcessorError(f"got {_describe(conversations)}, expected conversations: {_ROLES_HINT}")
    single = isinstance(conversations[0], Mapping)
    return [_read(one) for one in ([conversations] if single else conversations)]


def _read(messages: Any) -> Conversation:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ProcessorError(f"a conversation is {_describe(messages)}; {_ROLES_HINT}")
    result = Conversation([])
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ProcessorError(f"message {index} is {_describe(message)}; {_ROLES_HINT}")
        content = message.get("content")
        if content is None or isinstance(content, str):
            result.messages.append(message)
            continue
        if not isinstance(content, Sequence):
            raise ProcessorError(f"message {index}'s content is {_describe(content)}, expected text or a list of parts")
        parts = []
        for part in content:
            kind = _kind(part, index)
            if kind != "text":
                source = _source(part, _IMAGE_KEYS if kind == "image" else _VIDEO_KEYS, f"message {index}'s {kind} part")
                (result.images if kind == "image" else result.videos).append(source)
                part = {**part, "type": kind}  # OpenAI's image_url and parts without a type, for templates that ask for it
            parts.append(part)
        result.messages.append({**message, "content": parts})
    return result


def _kind(part: Any, index: int) -> str:
    """text, image or video, by the rule of the released chat template."""
    if not isinstance(part, Mapping):
        raise ProcessorError(f'message {index} has a part {_describe(part)}, expected a dict such as {{"type": "text", ...}}')
    kind = part.get("type")
    if kind == "image" or "image" in part or "image_url" in part:
        return "image"
    if kind == "video" or "video" in part:
        return "video"
    if "text" not in part:
        raise ProcessorError(f"message {index} has a part of type {kind!r}, expected text, image or video")
    return "text"


def _source(part: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    for key in keys:
        value = part.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping) and "url" in value:  # OpenAI's image_url: {"url": ...}
            value = value["url"]
        return base64_bytes(value) if key == "base64" and isinstance(value, str) else value
    raise ProcessorError(f"{where} holds no data, expected one of the keys {', '.join(keys)}")


def _describe(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
