"""The frozen encoder that a job names. Importing this imports no encoder: that takes seconds, and text needs none."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator
from torch import Tensor

from cafo.encoder_spec import EncoderSpec
from cafo.images import Preprocess
from rayjobs.config import config
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import is_url, resolve_path

if TYPE_CHECKING:
    from cafo.encoders import ImageEncoder


def _if_there(text: str) -> str:
    """A file or folder by its absolute path, since workers need not run where the command was typed; names and URLs
    as they are."""
    return os.path.abspath(text) if os.path.exists(text) else text


PathOrName = Annotated[str, AfterValidator(_if_there)]


@config
class VisionEncoderConfig:
    """One frozen encoder."""

    kind: Literal["clip", "dino", "timm", "pixels"]
    """Which library and preprocessing: open_clip, DINO's, or timm's; `pixels` is the picture itself, the floor."""
    name: PathOrName = ""
    """Architecture in open_clip's or timm's spelling, or a folder in timm's format; DINO is resnet50 by default; of
    pixels, the side."""
    weights: PathOrName = ""
    """open_clip's pretrained tag, a file or folder, which may be a URL, or random:SEED."""
    config: PathOrName = ""
    """open_clip model JSON of a CLIP of your own; found beside the weights when empty."""
    quick_gelu: bool | None = None
    """Whether the weights were trained with QuickGELU, where they cannot tell."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 or bf16."""

    def spec(self) -> EncoderSpec:
        return EncoderSpec(
            kind=self.kind,
            name=self.name,
            weights=self.weights,
            config=self.config,
            quick_gelu=self.quick_gelu,
            precision=self.precision,
        )


class EncoderInfo(NamedTuple):
    """What is to be known of an encoder without holding it."""

    spec: EncoderSpec
    identity: str
    preprocess: Preprocess
    clip: bool
    scales: int = 0
    """0 for the embedding of unit norm, else for `multi_scale` of so many blocks, end to end."""
    batch: int = 64
    """Images that it reads at once."""

    def features(self, encoder: ImageEncoder, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C) float32 on the CPU; `encoder` is this encoder, held."""
        return torch.cat([self._features(encoder, batch).cpu() for batch in images.split(self.batch)])

    def _features(self, encoder: ImageEncoder, batch: Tensor) -> Tensor:
        if not self.scales:
            return encoder.encode_image(batch)
        return torch.cat(encoder.multi_scale(batch, self.scales), dim=1)


def load_vision_encoder(spec: EncoderSpec, device: torch.device | str = "cpu") -> ImageEncoder:
    """`cafo.encoders.load_encoder`, with this machine's copies of what lies at URLs."""
    from cafo.encoder_weights import config_beside
    from cafo.encoders import load_encoder

    if is_url(spec.weights) and not spec.config and (file := resolve_path(spec.weights)).is_file():
        spec = replace(spec, config=str(config_beside(file) or ""))  # a copy of the file alone has none beside it
    texts = {name: getattr(spec, name) for name in ("name", "weights", "config")}
    copies: Any = {name: str(cached_path(text)) for name, text in texts.items() if is_url(text)}
    return load_encoder(replace(spec, **copies), device)
