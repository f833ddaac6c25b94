"""One picture from anything that holds one, as upright opaque RGB."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from qvlmoe_jax.errors import MediaError
from qvlmoe_jax.sources import FetchLimits, name_of, open_source

_VECTOR_FORMATS = ("EPS", "WMF")  # Pillow runs other programs to draw them
_DAMAGED = (  # what Pillow's readers raise on damaged files: each format's has its own
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    AttributeError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
_OPENING = threading.Lock()


def load_image(source: Any, limits: FetchLimits | None = None) -> Image.Image:
    """A PIL picture in mode RGB.

    Turned upright by its EXIF tag; transparency laid over white; 16-bit grey scaled to 8; the first frame of an animation;
    CMYK and palettes converted by Pillow.

    Args:
      source: a PIL picture, an array (`rgb_array`), or what `open_source` takes.
    Raises:
      MediaError: unreadable, truncated, a decompression bomb (more than `PIL.Image.MAX_IMAGE_PIXELS`), no pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if hasattr(source, "__array__") and hasattr(source, "shape"):
        return Image.fromarray(rgb_array(source, dims=3))
    stream = open_source(source, limits or FetchLimits())
    name = name_of(source, "picture")
    try:
        with _opened(stream) as image:
            if image.format in _VECTOR_FORMATS:
                raise MediaError(f"{name} is a drawing ({image.format}), expected pixels; convert it to PNG")
            return _to_rgb(image, name)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, a decompression bomb unless you know it; "
            "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} has no format that Pillow knows, expected PNG, JPEG, WebP, GIF, TIFF or BMP") from error
    except _DAMAGED as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name} cannot be decoded: {error}; expected a whole, undamaged picture") from error


def _opened(stream: Any) -> Image.Image:
    """Reads the header. Pillow only warns of a bomb below twice its limit; the filters of warnings belong to all threads."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # EXIF that cannot be read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(stream)


def rgb_array(array: Any, *, dims: int) -> np.ndarray:
    """`[...,H,W,3]` uint8 from a numpy, jax or torch array of 8-bit grey levels.

    Args:
      array: channels last or first (last where both fit), 1, 3 or 4 of them, or none.
      dims: 3 for a picture, 4 for a clip.
    Raises:
      MediaError: another shape, or values that are not uint8 (a float's scale could only be guessed).
    """
    pixels = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    what = "clip" if dims == 4 else "picture"
    layout = "[frames,H,W,3]" if dims == 4 else "[H,W,3]"
    if pixels.dtype != np.uint8:
        raise MediaError(f"the {what}'s array is {pixels.dtype}, expected uint8 grey levels 0..255; scale and round it first")
    if pixels.ndim == dims - 1:
        pixels = pixels[..., None]
    if pixels.ndim == dims and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[-3] in (1, 3, 4):
        pixels = np.moveaxis(pixels, -3, -1)
    if pixels.ndim != dims or pixels.shape[-1] not in (1, 3, 4) or not pixels.size:
        raise MediaError(f"the {what}'s array has shape {list(np.shape(array))}, expected {layout}")
    if pixels.shape[-1] == 4:
        pixels = _over_white(pixels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """Alpha over white, rounded as transformers does (image_transforms.py, `convert_to_rgb`)."""
    alpha = rgba[..., 3:] / 255
    return np.round(alpha * rgba[..., :3] + (1 - alpha) * 255).astype(np.uint8)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise MediaError(f"{name} is {image.width} x {image.height} pixels, expected at least 1 x 1")
    try:
        image.load()
    except _DAMAGED as error:
        raise MediaError(f"{name} cannot be decoded: {error}; expected a whole, undamaged picture") from error
    image = _upright(image)
    if image.mode.startswith("I"):
        return _from_wide_grey(image, name)
    if image.mode == "F":
        raise MediaError(f"{name} holds floating-point pixels, whose scale is anybody's guess; convert it to 8 or 16 bits")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:  # LAB, premultiplied alpha
        raise MediaError(f"{name} is in mode {image.mode}, which Pillow does not turn into RGB; convert it first") from error


def _upright(image: Image.Image) -> Image.Image:
    """By the EXIF tag. One that cannot be read is no reason to refuse the picture."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return image


def _from_wide_grey(image: Image.Image, name: str) -> Image.Image:
    """16 bits to 8 by the high byte, as Pillow reads 16-bit colour. Its own conversion of grey clips all above 255 to white.

    Mode I has 32 bits and is what Pillow makes of 8-bit grey too: levels that fit into 8 bits stay.
    """
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise MediaError(f"{name} holds grey levels {low} .. {high}, expected 0 .. 65535; scale it to 16 bits")
    if image.mode == "I" and high <= 255:
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
