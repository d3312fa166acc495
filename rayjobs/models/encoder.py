"""The frozen image encoder that a config names.

Importing this module imports neither PyTorch, open_clip nor timm, which take seconds.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator

from cafo.encoder_spec import EncoderSpec
from rayjobs.config import config
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import ShownAs, is_url, resolve_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cafo.encoders import ImageEncoder
    from cafo.images import Preprocess


def _absolute_if_path(text: str) -> str:
    """The absolute path of an existing file or folder, because workers may run elsewhere; other text is unchanged."""
    return os.path.abspath(text) if os.path.exists(text) else text


PathOrName = Annotated[str, AfterValidator(_absolute_if_path), ShownAs("path or name")]


@config
class VisionEncoderConfig(EncoderSpec):
    """A frozen encoder. It is an `EncoderSpec` whose paths may also be URLs."""

    kind: Literal["clip", "dino", "timm", "pixels"]
    """Library and preprocessing of the encoder: open_clip's, DINO's or timm's; `pixels` is the image itself, scaled
    down, as a baseline."""
    name: PathOrName = ""
    """Architecture in open_clip's or timm's spelling, or a folder in timm's format; resnet50 by default for DINO; the
    side in pixels for `pixels`."""
    weights: PathOrName = ""
    """Weights: open_clip's pretrained tag, a file or folder, which may be a URL, or random:SEED."""
    config: PathOrName = ""
    """open_clip's model JSON of a custom CLIP; found beside the weights when empty."""
    quick_gelu: bool | None = None
    """The weights were trained with QuickGELU. Needed only where neither their file nor their name tells."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder's weights and computation: fp32 or bf16."""


class EncoderInfo(NamedTuple):
    """The facts about an encoder that are known without loading its weights."""

    spec: EncoderSpec
    """Kind, name and weights, from which it is loaded."""
    identity: str
    """Digest of all that its features depend on."""
    preprocess: Preprocess
    """From an image to the encoder's pixels."""
    clip: bool
    """True if it also encodes text."""
    scales: int = 0
    """0 for the embedding of unit norm; otherwise the number of blocks of `multi_scale`, whose features are joined."""
    batch: int = 64
    """Number of images that it encodes at once."""
    unprojected: bool = False
    """True for what comes before CLIP's last projection, of any length, in place of the embedding."""

    def features(self, encoder: ImageEncoder, images: Tensor) -> Tensor:
        """Features (B, C) float32, on the CPU, of images (B, 3, S, S). `encoder` is this encoder, loaded."""
        import torch

        if not len(images):
            side = encoder.preprocess.size
            return self.encode(encoder, torch.zeros(1, 3, side, side)).cpu()[:0]
        return torch.cat([self.encode(encoder, batch).cpu() for batch in images.split(self.batch)])

    def encode(self, encoder: Any, batch: Tensor) -> Tensor:
        """Features (B, C) float32, where the encoder is, of images (B, 3, S, S) that it encodes at once."""
        import torch

        if self.scales:
            return torch.cat(encoder.multi_scale(batch, self.scales), dim=1)
        return encoder.encode_unprojected(batch) if self.unprojected else encoder.encode_image(batch)


_UNPROJECTED = " before projection"


def unprojected_source(encoder: str) -> str:
    """Return the name of the features before an encoder's last projection."""
    return encoder + _UNPROJECTED


def encoder_of(source: str) -> str:
    """Return the name of the encoder that some features come from."""
    return source.removesuffix(_UNPROJECTED)


def load_vision_encoder(spec: EncoderSpec, device: torch.device | str = "cpu") -> ImageEncoder:
    """Load an encoder with `cafo.encoders.load_encoder`; what is at URLs is first copied to this machine.

    Raises ValueError for an encoder that cannot be loaded.
    """
    from cafo.encoder_weights import config_beside
    from cafo.encoders import load_encoder

    if is_url(spec.weights) and not spec.config and (file := resolve_path(spec.weights)).is_file():
        spec = replace(spec, config=str(config_beside(file) or ""))  # beside the local copy of one file there is none
    texts = {name: getattr(spec, name) for name in ("name", "weights", "config")}
    copies: Any = {name: str(cached_path(text)) for name, text in texts.items() if is_url(text)}
    return load_encoder(replace(spec, **copies), device)
