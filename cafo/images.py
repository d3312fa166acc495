"""Decode images, preprocess them for an encoder, and make augmented views that are reproducible one by one.

CaFo (arXiv 2303.02151), section 4.1: keys average over RandomResizedCrop (scale 0.5-1, bicubic) and horizontal flips.
The crop of a view is a function of (seed, image, view number). So it does not depend on the order of batches or the
number of workers, and all encoders get the same crop. torchvision's RandomResizedCrop, whose sampling is copied here,
takes its randomness from a global generator.

Legend: S side of an encoder's square input, in pixels.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from cafo.errors import ImageError
from cafo.files import LFS_POINTER, is_lfs_pointer

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ImageInput = str | Path | bytes | Image.Image | np.ndarray
"""A path, a file's bytes, a PIL image, or an array: (H, W, 3), (H, W, 4) or (H, W), of uint8, uint16, or of floating
point from 0 to 1."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

MAX_PIXELS = 64_000_000
"""Largest width x height of an image that is decoded."""
THIN = 32
"""Largest ratio of the sides that is resized as a whole; of a thinner image, only the middle is."""

_ORIENTATION = 0x0112
"""EXIF tag of the camera's orientation."""
_DARK = 16
"""A 16-bit image whose largest 8-bit value is below this is nearly black."""

_WARNED: set[str] = set()
"""Kinds of odd images that were logged in this process."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_image(source: ImageInput, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB: the same pixels whether it is given as a file, as a PIL image or as an array.

    EXIF rotation is applied, transparency is shown over white, and of an animation the first frame is taken, or the
    present one of a PIL image. 16-bit values are scaled by the range of the format, as OpenCV and torchvision do it.
    But where none exceeds 255, they are 8-bit values in a wide format, and are taken as they are: scaled, they would be
    black. The first image of this kind is logged, and the first that is nearly black after scaling.

    Args:
        source: the image. An object with a path's `read_bytes`, such as a path in a bucket, is a path too.
        name: name of the image in error messages; by default the path.
        max_pixels: largest width x height, checked on the header before any pixel is decoded.

    Raises:
        ImageError: the image is missing, empty, truncated, corrupt, too large, or cannot be shown in RGB.
    """
    name = name or _describe(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    if not isinstance(source, str | Path | bytes | Image.Image):
        source = _read_bytes(source, name)
    try:
        if isinstance(source, Image.Image):
            return _decode(source, name, max_pixels)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            decoded = _decode(image, name, max_pixels)
            return decoded.copy() if decoded is image else decoded  # without the closed file
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, struct.error, zlib.error and more
        if _is_pointer(source):
            raise ImageError(f"{name}: is a Git LFS pointer, not the image itself; run `git lfs pull`") from error
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _describe(source: ImageInput) -> str:
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"an array {source.shape} of {source.dtype}"
    return f"a PIL image {source.size}" if isinstance(source, Image.Image) else str(source)


def _read_bytes(source: Any, name: str) -> bytes:
    if not hasattr(source, "read_bytes"):
        raise ImageError(
            f"{name[:80]}: a {type(source).__name__} is no image; give a path, a PIL image or an array (H, W, 3)"
        )
    try:
        return source.read_bytes()
    except FileNotFoundError as error:  # any other error is the network's
        raise ImageError(f"{name}: no such file") from error


def _is_pointer(source: str | Path | bytes | Image.Image) -> bool:
    if isinstance(source, bytes):
        return source.startswith(LFS_POINTER)
    return not isinstance(source, Image.Image) and is_lfs_pointer(source)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Return an array as a PIL image; floating point is scaled from 0…1 to 0…255 and rounded."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise ImageError(f"{name}: an image has the shape (H, W, 3), (H, W, 4) or (H, W), channels last")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is refused too
            raise ImageError(
                f"{name}: floating-point values run from 0 to 1, got {array.min():.4g} to {array.max():.4g}; scale them"
            )
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype == np.uint16:
        return Image.fromarray(_to_8_bits(array, name))
    raise ImageError(f"{name}: an image is of uint8, uint16 or floating point from 0 to 1; convert it")


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels}")
    colours_of_16_bits = _has_16_bit_colours(image)
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    rgb = _to_rgb(image, name)
    if colours_of_16_bits and _largest_value(rgb) == 0:
        _warn_once("is black: Pillow keeps the high byte of 16-bit colours; convert the file to 8 bits", name)
    return rgb


def _has_16_bit_colours(image: Image.Image) -> bool:
    """Return whether Pillow will drop the low byte of each colour, as it does for 16-bit RGB files."""
    tiles = [str(tile[3]) for tile in getattr(image, "tile", [])]
    return not image.mode.startswith("I") and any(";16" in tile for tile in tiles)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError(f"{name}: 32-bit grey values from {pixels.min()} to {pixels.max()} have no plain scale")
        return Image.fromarray(_to_8_bits(pixels, name)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no plain scale; convert the file to 8 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # CLIP drops alpha, which shows the hidden colour of transparent pixels. Image viewers show white.
        foreground = image.convert("RGBA")
        white = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(white, foreground).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    """Scale 16-bit values by the range of the format; values of at most 255 are 8-bit values and stay as they are."""
    largest = int(pixels.max())
    if 0 < largest <= 255:
        _warn_once("has no value above 255 in a 16-bit or wider format: its values are taken as 8-bit values", name)
        return pixels.astype(np.uint8)
    if 0 < largest // 257 < _DARK:
        _warn_once(
            f"is nearly black: its largest value is {largest} of 65535; scale the file's values to the whole range",
            name,
        )
    return (pixels // 257).astype(np.uint8)


def _largest_value(image: Image.Image) -> int:
    return max(int(high) for _, high in image.getextrema())  # type: ignore[misc]


def _warn_once(message: str, name: str) -> None:
    """Log what is odd about an image, for the first image of each kind in this process."""
    kind = message.split(":")[0]
    if kind not in _WARNED:
        _WARNED.add(kind)
        logger.warning("%s %s. Other such images are not named.", name, message)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The preprocessing that makes an encoder's input from a PIL image, which `load_image` first turns into RGB.

    It is part of the encoder's identity.
    """

    size: int
    """S, side of the encoder's square input in pixels"""
    resize: int
    """length of the shorter side before the centre crop, in pixels"""
    mode: Literal["shortest", "squash"] = "shortest"
    """`shortest` resizes the shorter side and crops the centre; `squash` resizes to S x S and crops nothing"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the view for evaluation: (3, S, S) float32."""
        return self._tensor(self.crop(image))

    def crop(self, image: Image.Image) -> Image.Image:
        """Return the view for evaluation before its normalisation: an RGB image of side S."""
        image = load_image(image, max_pixels=image.width * image.height)
        if self.mode == "squash":
            return image.resize((self.size, self.size), _FILTERS[self.interpolation])
        short = min(image.size)
        # Only the middle of a thin image is resized: the rest would be cropped away, and could take all memory.
        width, height = (min(side, THIN * short) for side in image.size)
        left, top = ((whole - side) / 2 for whole, side in zip(image.size, (width, height), strict=True))
        image = image.resize(
            (int(self.resize * width / short), int(self.resize * height / short)),
            _FILTERS[self.interpolation],
            box=(left, top, left + width, top + height),
        )
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

    def view(
        self, image: Image.Image, key: str, index: int, seed: int, *, min_area: float = 0.5, flips: bool = True
    ) -> Tensor:
        """Return an augmented view of an image: (3, S, S) float32. The arguments are those of `crop_view`."""
        return self._tensor(self.crop_view(image, key, index, seed, min_area=min_area, flips=flips))

    def crop_view(
        self, image: Image.Image, key: str, index: int, seed: int, *, min_area: float = 0.5, flips: bool = True
    ) -> Image.Image:
        """Return an augmented view before its normalisation: an RGB image of side S. Equal arguments give equal images.

        Args:
            image: the image.
            key: name of the image, such as its path, from which the crop is derived.
            index: number of the view.
            seed: seed of all views.
            min_area: smallest share of the image's area that the crop may have.
            flips: mirror half of the views.
        """
        image = load_image(image, max_pixels=image.width * image.height)
        box = random_view(*image.size, key=key, index=index, seed=seed, min_area=min_area)
        left, top, width, height, flip = box
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize((self.size, self.size), _FILTERS[self.interpolation])
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and flips else crop

    def _tensor(self, image: Image.Image) -> Tensor:
        import torch  # takes seconds; who only crops does not need it

        return self.normalise(torch.from_numpy(np.array(image)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels as an encoder reads them: (…, S, S, 3) uint8 → (…, 3, S, S) float32."""
        import torch

        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.movedim(-1, -3).float() / 255 - mean) / std


def random_view(
    width: int, height: int, *, key: str, index: int, seed: int, min_area: float = 0.5
) -> tuple[int, int, int, int, bool]:
    """Return the crop of one view, (left, top, width, height, flip), as torchvision's RandomResizedCrop samples it.

    The crop has `min_area` to 1 of the image's area and a ratio of the sides from 3/4 to 4/3; half of the views are
    mirrored.
    """
    digest = hashlib.sha256(f"{seed}\0{index}\0{key}".encode()).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    flip = rng.random() < 0.5
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h, flip
    # The image is long and thin: take the largest centred crop whose ratio is in range.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, max(w, 1), max(h, 1), flip
