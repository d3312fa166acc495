"""The model that a config names for inference: a frozen base, with or without an adapter, that may read images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adapter.errors import CheckpointError
from rayjobs.config import config
from rayjobs.models.base_model import BaseModelConfig, open_tokenizer
from rayjobs.models.image_conditioning import ImageConditioning, VisionConfig, open_image_conditioning
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import ModelPath

if TYPE_CHECKING:
    from adapter.adapter_file import AdapterFile
    from adapter.base.checkpoint import Checkpoint
    from adapter.model import AdaptedModel

logger = logging.getLogger(__name__)


class OpenedSource(NamedTuple):
    """The parts of a model that are known before its weights are loaded."""

    checkpoint: Checkpoint
    tokenizer: Path
    """path or URL of the tokenizer"""
    conditioning: ImageConditioning | None
    """the image encoder; None if images are left out"""
    saved: AdapterFile | None
    """the adapter; None for the base alone"""


@config
class AdapterSourceConfig:
    """The model to run."""

    base: BaseModelConfig
    adapter: ModelPath | None = None
    """Adapter file: this project's own, official v1, litgpt or PEFT; or an adapter's id on the Hugging Face hub,
    org/name; null runs the base without an adapter."""
    vision: VisionConfig | None = None
    """Image encoder that the adapter was trained with; null for an adapter or a base that reads only text."""
    blind: bool = False
    """Leave images out although the adapter reads them, to measure what they add."""

    def open(self, *, needs_encoder: bool = True, weights: bool = True) -> OpenedSource:
        """Open the base, the adapter and its image encoder, and check that they fit, before weights are loaded.

        needs_encoder: False where there is no image to read, so that an adapter that reads images needs no encoder.
        weights: False to leave the weights of a base on the hub there; its identity is then not compared.

        Raises a UserError or an AdapterError if they do not fit, or if an encoder is missing and `blind` is not set.
        """
        from adapter.adapter_file import check_adapter_fits
        from adapter.adapter_formats import read_adapter

        checkpoint, tokenizer = self.base.open(weights=weights)
        blind = self.blind or (self.vision is None and not needs_encoder)
        file = None if self.adapter is None else read_adapter(cached_path(self.adapter))
        trained_with = file.vision if file else None
        conditioning = open_image_conditioning(self.adapter, trained_with, self.vision, blind)
        if file is not None:
            try:
                check_adapter_fits(
                    file,
                    checkpoint.config,
                    fingerprint=checkpoint.fingerprint() if checkpoint.has_weights else None,
                    tokenizer_sha256=open_tokenizer(tokenizer).sha256,
                    encoder=_identity(conditioning),
                )
            except CheckpointError as error:
                raise CheckpointError(f"{self.adapter}: {str(error).removeprefix(f'{self.adapter}: ')}") from error
            if (trained := file.base_dtype) not in (None, self.base.dtype):
                logger.warning("%s: trained on a base in %s, run on one in %s", self.adapter, trained, self.base.dtype)
        return OpenedSource(checkpoint, tokenizer, conditioning, file)

    def load(self, device: str, conditioning: ImageConditioning | None) -> AdaptedModel:
        """The model on a device. Raises an error for an adapter that was trained with another image encoder."""
        return self.base.load(self.adapter, device, encoder=_identity(conditioning))


def _identity(conditioning: ImageConditioning | None) -> str | None:
    return None if conditioning is None else conditioning.encoder.identity
