"""The model that a config names for inference: a frozen base, with or without an adapter, that may read images."""

from adapter.model import AdaptedModel
from rayjobs.config import config
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, VisionConfig, open_image_conditioning
from rayjobs.storage.paths import AnyPath


@config
class AdapterSourceConfig:
    """The model to run."""

    base: BaseModelConfig
    adapter: AnyPath | None = None
    """Adapter file: this project's own, official v1, litgpt or PEFT; null runs the base without an adapter."""
    vision: VisionConfig | None = None
    """Image encoder that the adapter was trained with; null for an adapter or a base that reads only text."""
    blind: bool = False
    """Leave images out although the adapter reads them, to measure what they add."""

    def open_conditioning(self) -> ImageConditioning | None:
        """The adapter's image encoder, checked to be its own; None if images are left out.

        Raises a UserError if adapter and encoder do not fit, or if an encoder is missing and `blind` is not set.
        """
        return open_image_conditioning(self.adapter, self.vision, self.blind)

    def load(self, device: str, conditioning: ImageConditioning | None) -> AdaptedModel:
        """The model on a device. Raises an error for an adapter that was trained with another image encoder."""
        encoder = None if conditioning is None else conditioning.encoder.identity
        return self.base.load(self.adapter, device, encoder=encoder)
