"""A record in any of the ecosystem's spellings -> HF's list of messages, media as plain references in the content.

`messages`: HF and TRL (`{"type": "image"}` items take the pictures of `images` in order), OpenAI (`image_url`), LLaMA-Factory
(`<image>` in the text). `conversations`: Qwen's finetuning data (`image`, `video`), ShareGPT (`images`, `videos`), and the
first Qwen-VL's `<img>path</img>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.records import RawRecord

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bard": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
MEDIA = ("image", "video")
_ITEM_KINDS = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video"}
_PLACEHOLDER = re.compile(r"<(image|video)>|(?:Picture \d+: ?)?<img>(.*?)</img>", re.DOTALL)


class RecordError(Exception):
    """Why a record cannot be used. Caught by the pipeline, which counts, names and skips the record."""


def to_messages(record: RawRecord) -> list[Message]:
    """The record as messages whose `content` is a list of `{"type": "text", "text"}`, `{"type": "image", "image"}` and
    `{"type": "video", "video"}` items; a medium is a path, a data URI or bytes, as the record had it.

    Raises:
      RecordError: not JSON, no known keys, an unknown role, placeholders and media that do not match, no assistant turn.
    """
    fields = _fields(record.payload)
    if record.format == "auto":
        known = [key for key in ("messages", "conversations") if fields.get(key) is not None]
        if not known:
            keys = sorted(key for key, value in fields.items() if value is not None)
            raise RecordError(f"has the keys {', '.join(keys) or '(none)'}, expected messages or conversations")
        key = known[0]
    else:
        key = record.format
    turns = fields.get(key)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError(f"{key} is {_short(turns)}, expected a list of turns")
    if fields.get("tools"):
        raise RecordError("has tools, which are not supported in training data")
    pools = {kind: _pool(fields, kind) for kind in MEDIA}
    messages = [_turn(turn, i, pools) for i, turn in enumerate(turns)]
    if isinstance(fields.get("system"), str) and fields["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": fields["system"]}]})
    _give_unplaced(messages, pools, plain=key == "messages" and all(isinstance(turn.get("content"), str) for turn in turns))
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError("has no assistant turn, so there is nothing to learn")
    return messages


def _fields(payload: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(payload, bytes):
        try:
            payload = json.loads(payload)
        except ValueError as error:  # not JSON, or not UTF-8
            raise RecordError(f"is not JSON: {error}") from None
        except RecursionError:
            raise RecordError("is JSON nested too deeply") from None
    if not isinstance(payload, dict):
        raise RecordError(f"is {_short(payload)}, expected an object")
    return payload


def _pool(fields: Mapping[str, Any], kind: str) -> Iterator[Any]:
    """The record's media of this kind in order, from `image` / `images` (`video` / `videos`), a list or a single one."""
    found: list[Any] = []
    for key in (kind, f"{kind}s"):
        value = fields.get(key)
        if value is not None:
            found.extend(value if isinstance(value, list | tuple) else [value])
    return iter(found)


def _turn(turn: Any, index: int, pools: Mapping[str, Iterator[Any]]) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"turn {index} is {_short(turn)}, expected an object")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"turn {index} has the role {_short(role)}, expected one of {', '.join(sorted(ROLES))}")
    if turn.get("tool_calls"):
        raise RecordError(f"turn {index} has tool_calls, which are not supported in training data")
    if isinstance(content, str):
        items = list(_split(content, index, pools))
    elif isinstance(content, Sequence):
        items = [item for part in content for item in _item(part, index, pools)]
    else:
        raise RecordError(f"turn {index} has the content {_short(content)}, expected text or a list of items")
    if ROLES[role] == "assistant":
        if any(item["type"] != "text" for item in items):
            raise RecordError(f"turn {index} has a picture or video in an assistant turn")
        if not any(item["text"].strip() for item in items):
            raise RecordError(f"turn {index} is an empty assistant turn")
    return {"role": ROLES[role], "content": items}


def _split(text: str, index: int, pools: Mapping[str, Iterator[Any]]) -> Iterator[dict[str, Any]]:
    """Text around placeholders. Where there are any, the white space beside them goes, as in Qwen's own finetuning code."""
    at, found = 0, False
    for match in _PLACEHOLDER.finditer(text):
        found = True
        if before := text[at : match.start()].strip():
            yield {"type": "text", "text": before}
        kind = match[1] or "image"
        yield {"type": kind, kind: match[2].strip() if match[2] is not None else _next(pools, kind, index)}
        at = match.end()
    rest = text[at:].strip() if found else text
    if rest:
        yield {"type": "text", "text": rest}


def _item(part: Any, index: int, pools: Mapping[str, Iterator[Any]]) -> Iterator[dict[str, Any]]:
    """One item of a content list. Parquet fills absent keys with null, so null means absent."""
    if isinstance(part, str):
        yield {"type": "text", "text": part}
        return
    if not isinstance(part, dict):
        raise RecordError(f"turn {index} has the content item {_short(part)}, expected an object")
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in ("image_url", "video_url", *MEDIA, "text") if part.get(key) is not None), None)
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise RecordError(f"turn {index} has a text item with {_short(part.get('text'))}, expected text")
        yield {"type": "text", "text": part["text"]}
        return
    medium = _ITEM_KINDS.get(kind) if isinstance(kind, str) else None
    if medium is None:
        raise RecordError(f"turn {index} has a content item of type {_short(kind)}, expected text, image, image_url or video")
    given = next((part[key] for key in (f"{medium}_url", medium, "url", "path", "base64") if part.get(key) is not None), None)
    if isinstance(given, dict) and given.get("url") is not None:
        given = given["url"]
    elif part.get("base64") is not None and given is part["base64"]:
        given = f"data:;base64,{given}"
    yield {"type": medium, medium: _next(pools, medium, index) if given is None else given}


def _next(pools: Mapping[str, Iterator[Any]], kind: str, index: int) -> Any:
    for value in pools[kind]:
        return value
    raise RecordError(f"turn {index} asks for more {kind}s than the record has")


def _give_unplaced(messages: list[Message], pools: Mapping[str, Iterator[Any]], *, plain: bool) -> None:
    """Media that no placeholder took. TRL puts them before the first user turn's text when no turn places any itself."""
    left = [{"type": kind, kind: value} for kind in MEDIA for value in pools[kind]]
    if not left:
        return
    placed = sum(item["type"] != "text" for message in messages for item in message["content"])
    first = next((message for message in messages if message["role"] == "user"), None)
    if not plain or placed or first is None:
        kinds = ", ".join(f"{sum(item['type'] == kind for item in left)} {kind}(s)" for kind in MEDIA)
        raise RecordError(f"has media that no placeholder asks for: {kinds} more than placeholders")
    first["content"] = left + first["content"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
