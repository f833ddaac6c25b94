"""What a record calls a picture or a video -> a decoded picture, or a file to read: local paths, file URIs, data URIs, bytes."""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from pathlib import Path
from typing import Any

from PIL import Image

from qvlmoe_jax.errors import MediaError
from qvlmoe_jax.images import load_image
from train.formats import Message, RecordError


def load_media(messages: list[Message], root: str) -> list[Message]:
    """The messages with each picture decoded (`PIL.Image`, RGB) and each video as an absolute path.

    Raises:
      RecordError: a file that is not there, bytes that are no picture, a remote address.
    """
    return [{**message, "content": [_load(item, root) for item in message["content"]]} for message in messages]


def _load(item: dict[str, Any], root: str) -> dict[str, Any]:
    if item["type"] == "image":
        return {"type": "image", "image": load_picture(item["image"], root)}
    if item["type"] == "video":
        if not isinstance(item["video"], str) or item["video"].startswith("data:"):
            raise RecordError(f"has a video given as {type(item['video']).__name__}, expected a local path")
        return {"type": "video", "video": str(_local(item["video"], root))}
    return item


def load_picture(given: Any, root: str) -> Image.Image:
    """RGB, as inference sees it, from a path (relative to `root`), a file or data URI, bytes, or HF's `{"bytes", "path"}`."""
    if isinstance(given, dict):  # how HF datasets stores a picture in Parquet
        given = given.get("bytes") if given.get("bytes") is not None else given.get("path")
    if isinstance(given, str):
        given = _decode_data_uri(given) if given.startswith("data:") else _local(given, root)
    elif not isinstance(given, bytes | Image.Image):
        raise RecordError(f"has a picture given as {type(given).__name__}, expected a path, a data URI or bytes")
    try:
        return load_image(given)
    except MediaError as error:
        raise RecordError(f"has a picture that cannot be used: {error}") from None


def _decode_data_uri(uri: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RecordError(f"has a data URI that begins {uri[:40]!r}, expected data:TYPE;base64,DATA")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"has a data URI that is not base64: {error}") from None


def _local(given: str, root: str) -> Path:
    try:
        url = urllib.parse.urlsplit(given if "://" in given else "")
    except ValueError as error:
        raise RecordError(f"points to {given[:80]!r}, which is no URL ({error}), expected a local file") from None
    if url.scheme == "file":
        given = urllib.parse.unquote(url.path)
    elif url.scheme:
        raise RecordError(f"points to {given[:80]!r}, expected a local file: download the media first")
    path = Path(root, given)
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        found = False
    if not found:
        raise RecordError(f"points to {str(path)[:200]!r}, which does not exist")
    return path.absolute()
