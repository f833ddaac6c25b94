"""Where a picture or a video comes from: a path, bytes, a base64 or data URI, an http(s) URL with limits on size and time."""

from __future__ import annotations

import base64
import binascii
import io
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qvlmoe_jax.errors import MediaError

_CHUNK = 1 << 16


@dataclass(frozen=True)
class FetchLimits:
    """What a URL may cost: seconds in all, and bytes."""

    seconds: float = 30.0
    max_bytes: int = 256 * 2**20


def open_source(source: Any, limits: FetchLimits) -> Path | BinaryIO:
    """What PIL and av open: a file's path, or its bytes in memory.

    Args:
      source: a path, `file://` URL, `http(s)://` URL, `data:` URI, base64 text, bytes or a binary file.
    Raises:
      MediaError: no such file, a URL that fails or exceeds the limits, text that is none of these.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(source))
    if isinstance(source, os.PathLike):
        return _existing(Path(source))
    if hasattr(source, "read"):
        return source
    if not isinstance(source, str):
        raise MediaError(f"cannot read a {type(source).__name__}, expected a path, an http(s) URL, a data URI, bytes or a file")
    scheme = source[:10].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return io.BytesIO(_download(source, limits))
    if scheme == "data":
        return io.BytesIO(_data_uri(source))
    if scheme == "file":
        return _existing(Path(urllib.request.url2pathname(urllib.parse.urlsplit(source).path)))
    return _path_or_base64(source)


def name_of(source: Any, what: str) -> str:
    """What an error calls a source: its path or URL where it has one, "the picture" where it is data."""
    text = str(source) if isinstance(source, (str, os.PathLike)) else ""
    return text if 0 < len(text) <= 200 and text[:5].lower() != "data:" else f"the {what}"


def base64_bytes(text: str) -> BinaryIO:
    """The bytes of base64 text (HF's `base64` key), with or without a `data:` header."""
    if text[:5].lower() == "data:":
        return io.BytesIO(_data_uri(text))
    try:
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{_short(text)} is not base64: {error}; expected the encoded bytes of a file") from error


def _existing(path: Path) -> Path:
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        found = False
    if not found:
        raise MediaError(f"{_short(str(path))}: no such file; expected a path, an http(s) URL or a data URI")
    return path


def _path_or_base64(text: str) -> Path | BinaryIO:
    """HF's load_image takes bare base64 too; a real file's name wins."""
    try:
        return _existing(Path(text))
    except MediaError:
        if len(text) < 32:  # shorter than any picture: a mistyped name
            raise
        try:
            return base64_bytes(text)
        except MediaError:
            pass
        raise


def _data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise MediaError(f"{_short(uri)} has no comma; expected data:image/png;base64,...")
    if header.lower().endswith(";base64"):
        stream = base64_bytes(urllib.parse.unquote(body) if "%" in body else body)
        return stream.read()
    return urllib.parse.unquote_to_bytes(body)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """A redirect may not leave http(s): urllib would follow it to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise MediaError(f"{req.full_url} redirects to {_short(newurl)}, expected http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, limits: FetchLimits) -> bytes:
    deadline = time.monotonic() + limits.seconds
    request = urllib.request.Request(url, headers={"User-Agent": "qvlmoe-jax"})
    chunks, size = [], 0
    try:
        with urllib.request.build_opener(_WebOnly).open(request, timeout=limits.seconds) as response:
            size_told = response.headers.get("Content-Length", "")
            if size_told.isdigit() and int(size_told) > limits.max_bytes:
                raise MediaError(_too_large(url, int(size_told), limits))
            while chunk := response.read1(_CHUNK):
                chunks.append(chunk)
                size += len(chunk)
                if size > limits.max_bytes:
                    raise MediaError(_too_large(url, size, limits))
                if time.monotonic() > deadline:
                    raise TimeoutError
            if size_told.isdigit() and size < int(size_told):
                raise MediaError(f"{url} ended after {size} of {size_told} bytes; try again")
    except MediaError:
        raise
    except TimeoutError as error:
        raise MediaError(f"{url} took longer than {limits.seconds:g} s; download it first, or raise fetch_seconds") from error
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise MediaError(f"{url} took longer than {limits.seconds:g} s; download it first, or raise fetch_seconds") from error
        raise MediaError(f"{url} cannot be fetched: {error}; download it first and pass the path") from error
    return b"".join(chunks)


def _too_large(url: str, size: int, limits: FetchLimits) -> str:
    return f"{url} has {size} bytes or more, expected at most {limits.max_bytes}; download it first, or raise fetch_bytes"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:60] + f"... ({len(text)} characters)")
