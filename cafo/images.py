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
"""Largest width x height of an image that is decoded."""
THIN = 32
"""Largest ratio of the sides that is resized as a whole; of a thinner image, only the middle is."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_image(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB.

    EXIF rotation is applied, transparency is shown over white, 16-bit grey is scaled to 8 bits, and of an animation the
    first frame is taken.

    Args:
        source: a path, the bytes of a file, or an object with a path's `read_bytes`, such as a path in a bucket.
        name: name of the image in error messages; by default the path.
        max_pixels: largest width x height, checked on the header before any pixel is decoded.

    Raises:
        ImageError: the image is missing, empty, truncated, corrupt, too large, or cannot be shown in RGB.
    """
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    if not isinstance(source, str | Path | bytes):
        try:
            source = source.read_bytes()
        except FileNotFoundError as error:  # any other error is the network's
            raise ImageError(f"{name}: no such file") from error
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels}")
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
        # CLIP drops alpha, which shows the hidden colour of transparent pixels. Image viewers show white.
        foreground = image.convert("RGBA")
        white = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(white, foreground).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an encoder's input is made from an RGB image. It is part of the encoder's identity."""

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
        image = image.convert("RGB")
        if self.mode == "squash":
            return self._tensor(image.resize((self.size, self.size), _FILTERS[self.interpolation]))
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
        return self._tensor(image.crop((left, top, left + self.size, top + self.size)))

    def view(
        self, image: Image.Image, key: str, index: int, seed: int, *, min_area: float = 0.5, flips: bool = True
    ) -> Tensor:
        """Return augmented view number `index` of an image: (3, S, S) float32. Equal arguments give equal tensors.

        Args:
            image: the image.
            key: name of the image, such as its path, from which the crop is derived.
            index: number of the view.
            seed: seed of all views.
            min_area: smallest share of the image's area that the crop may have.
            flips: mirror half of the views.
        """
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
