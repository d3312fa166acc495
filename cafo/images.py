"""Images: robust decoding, one encoder's preprocessing, and augmented views that depend on nothing but their name.

CaFo (arXiv 2303.02151), section 4.1: keys average over RandomResizedCrop (scale 0.5-1, bicubic) and horizontal flips.
A view is drawn from (seed, image, view number) alone, so the order of batches and the number of workers do not
matter, and all encoders see the same crop.

Legend: S side of the square an encoder reads, in pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cafo.errors import ImageError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

MAX_PIXELS = 64_000_000
THIN = 32
"""Of an image whose sides differ by more than this factor only the middle is resized."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_image(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGB: EXIF rotation applied, transparency over white, 16-bit grey scaled, first frame of an animation.

    Args:
        source: a path, the file's bytes, or what has a path's `read_bytes`, such as an object in a bucket.
        name: for messages, when given bytes.
        max_pixels: bound on width x height, checked on the header before any pixel is decoded.

    Raises:
        ImageError: missing, empty, truncated, corrupt, too large, or of a kind without a plain meaning in RGB.
    """
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    if not isinstance(source, str | Path | bytes):
        try:
            source = source.read_bytes()
        except FileNotFoundError as error:  # what else goes wrong is the network's fault, not the image's
            raise ImageError(f"{name}: no such file") from error
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name}: {width} x {height} pixels are more than the bound of {max_pixels}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError(f"{name}: 32-bit grey values from {pixels.min()} to {pixels.max()} have no plain scale")
        return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no plain scale; convert the file to 8 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # CLIP drops alpha, and so shows whatever colour hides under transparent pixels; white is what a viewer shows.
        above = image.convert("RGBA")
        white = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(white, above).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """One encoder's way from an RGB image to its input; part of the encoder's identity."""

    size: int
    """S"""
    resize: int
    """shorter side before the centre crop, in pixels"""
    mode: Literal["shortest", "squash"] = "shortest"
    """`squash` resizes to S x S and crops nothing"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """The view for evaluation: (3, S, S) float32."""
        image = image.convert("RGB")
        if self.mode == "squash":
            return self._tensor(image.resize((self.size, self.size), _FILTERS[self.interpolation]))
        short = min(image.size)
        # of a thin image only the middle: the rest is cropped away anyway, and resized it could take all memory
        width, height = (min(side, THIN * short) for side in image.size)
        left, top = ((whole - side) / 2 for whole, side in zip(image.size, (width, height), strict=True))
        image = image.resize(
            (int(self.resize * width / short), int(self.resize * height / short)),
            _FILTERS[self.interpolation],
            box=(left, top, left + width, top + height),
        )
        left, top = (round((side - self.size) / 2) for side in image.size)
        return self._tensor(image.crop((left, top, left + self.size, top + self.size)))

    def view(
        self, image: Image.Image, key: str, index: int, seed: int, *, min_area: float = 0.5, flips: bool = True
    ) -> Tensor:
        """Augmented view number `index` of the image called `key`: (3, S, S) float32. The same call, the same
        tensor."""
        box = random_view(*image.size, key=key, index=index, seed=seed, min_area=min_area)
        left, top, width, height, flip = box
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
        crop = crop.resize((self.size, self.size), _FILTERS[self.interpolation])
        return self._tensor(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and flips else crop)

    def _tensor(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def random_view(
    width: int, height: int, *, key: str, index: int, seed: int, min_area: float = 0.5
) -> tuple[int, int, int, int, bool]:
    """Crop box (left, top, width, height) and flip of one view: area `min_area`-1 of the image, ratio 3/4-4/3, flip at
    1/2."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{key}".encode()).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    flip = rng.random() < 0.5
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h, flip
    # A long, thin image: the largest centred crop whose ratio is still in range.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, max(w, 1), max(h, 1), flip
