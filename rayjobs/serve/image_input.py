"""Images of requests: base64 text, data URLs and bytes, within limits. Nothing is fetched, and no path is opened."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image

from rayjobs.serve.api_errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are decoded. Pillow knows more, some of which start other programs."""

_DATA_URL = re.compile(r"data:(image/[\w.+-]+)?(;[\w.+=-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """The largest images that are taken."""

    bytes: int = 10 * 2**20
    """Size of the file."""
    pixels: int = 40_000_000
    """Width x height, which is known before any pixel is decoded."""


def decode_text(text: str, limits: ImageLimits, param: str = "image") -> Image.Image:
    """Return the RGB image of a data URL or of base64 text.

    param: name of the parameter, for messages. Raises ApiError: status 400 for what is no image, 413 for one that is
    too large.
    """
    found = _DATA_URL.match(text)
    if not found and re.match(r"\w+://", text):
        raise ApiError(f"{param} must be the image itself, as base64 or a data URL; no URL is fetched", param=param)
    encoded = text[found.end() if found else 0 :]
    if len(encoded) * 3 // 4 > limits.bytes + 2:
        raise _too_large(f"{len(encoded) * 3 // 4} bytes are more than {limits.bytes}", param)
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise ApiError(f"{param} is neither base64 nor a data URL with base64: {error}", param=param) from error
    return decode_bytes(content, limits, param)


def decode_bytes(content: bytes, limits: ImageLimits, param: str = "image") -> Image.Image:
    """Return the RGB image of a file's bytes, as `cafo.images.load_image` decodes it.

    param: name of the parameter, for messages. Raises ApiError: status 400 for what is no image, 413 for one that is
    too large.
    """
    from cafo.errors import ImageError
    from cafo.images import load_image

    if len(content) > limits.bytes:
        raise _too_large(f"{len(content)} bytes are more than {limits.bytes}", param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit on pixels and of odd metadata
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large("it has more pixels than are decoded", param) from error
    except Exception as error:  # readers of broken headers raise OSError, SyntaxError, struct.error and more
        kinds = ", ".join(FORMATS)
        raise ApiError(f"{param} is no image that can be read; give one of {kinds}", param=param) from error
    width, height = image.size
    if width * height > limits.pixels:
        raise _too_large(f"{width} x {height} pixels are more than {limits.pixels}", param)
    try:
        return load_image(image, name=param, max_pixels=limits.pixels)
    except ImageError as error:
        raise ApiError(str(error), param=param) from error


def _too_large(reason: str, param: str) -> ApiError:
    return ApiError(f"{param} is too large: {reason}; scale it down", status=413, param=param, code="image_too_large")
