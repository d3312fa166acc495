"""Image-conditioned adapters: the vision section of a config, and the frozen encoder that reads an adapter's images.

Importing this module imports no PyTorch, which takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from rayjobs.config import config
from rayjobs.errors import UserError
from rayjobs.models.encoder import EncoderInfo, VisionEncoderConfig, load_vision_encoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapter.image_projection import ImageProjectionConfig, Images


@config
class VisionConfig:
    """Settings of reading images. Without this section, training leaves images out."""

    encoder: VisionEncoderConfig
    """The frozen image encoder. Its identity is saved with the adapter, which then works with this encoder only."""
    scales: int = Field(default=4, ge=1)
    """Number of scales read from a ViT: its class token after that many evenly spaced blocks. A convolutional encoder
    gives all its stages and the final embedding, whatever this number."""
    bottleneck: int = Field(default=72, ge=1)
    """Hidden width of the image projection; 72 makes it about 0.6 M parameters at 7B, or 3.3 M for the ten tokens that
    an image becomes in v2."""
    mode: Literal["stored", "streamed"] = "stored"
    """stored: encode each image once, before training, and store its features; workers hold no encoder. streamed: send
    decoded images to the workers, which hold the encoder and encode the images in every epoch."""
    augment: bool = False
    """Train on a new random view of each image in every epoch (needs mode=streamed)."""
    min_area: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of an image that a random view shows. Use a value near 1 where questions may be about any part."""
    flips: bool = False
    """Mirror half of the random views. Leave off where questions are about left and right, letters or digits."""
    batch: int = Field(default=64, ge=1)
    """Number of images that the encoder reads at once."""

    def open(self) -> ImageConditioning:
        """Load the encoder once, to learn its identity and the widths of its features.

        Raises ValueError for an encoder that cannot be loaded, and for `augment` without mode=streamed.
        """
        if self.augment and self.mode == "stored":
            raise UserError(
                "vision.augment=true needs vision.mode=streamed: stored features are computed once, from whole images"
            )
        import torch

        from adapter.image_projection import ImageProjectionConfig

        encoder = load_vision_encoder(self.encoder)
        side = encoder.preprocess.size
        widths = tuple(scale.shape[1] for scale in encoder.multi_scale(torch.zeros(1, 3, side, side), self.scales))
        identity = f"{encoder.identity}-{len(widths)}scales"
        info = EncoderInfo(self.encoder, identity, encoder.preprocess, False, self.scales, self.batch)
        projection = ImageProjectionConfig(
            widths=widths, bottleneck=self.bottleneck, encoder=identity, preprocess=repr(encoder.preprocess)
        )
        return ImageConditioning(info, projection)


def open_image_conditioning(
    adapter: str | None, trained_with: ImageProjectionConfig | None, vision: VisionConfig | None, blind: bool
) -> ImageConditioning | None:
    """Load the encoder of an adapter that reads images, and check that the adapter was trained with it.

    adapter: its name for messages; None for the base model alone. trained_with: the adapter's projection; None for one
    that reads only text. blind: leave images out, though the adapter reads them.

    Returns None where images are left out. Raises ValueError for an encoder other than the adapter's own, for an
    encoder that a text adapter has no use for, and for an adapter that reads images when neither `vision` nor `blind`
    is set.
    """
    if blind:
        return None
    if vision is None:
        if trained_with is None:
            return None
        raise UserError(
            f"{adapter} reads images, through the encoder {trained_with.encoder or 'that it was trained with'} "
            f"({trained_with.preprocess}): name it in vision.encoder, or set blind=true to leave images out"
        )
    if trained_with is None:
        raise UserError(
            f"{adapter or 'the base model alone'} cannot read images: leave out the vision section, or name an adapter "
            "that was trained with one"
        )
    conditioning = vision.open()
    configured = conditioning.projection
    same_encoder = trained_with.encoder in ("", configured.encoder)  # empty: the file does not name its encoder
    if not same_encoder or trained_with.widths != configured.widths:
        raise UserError(
            f"{adapter} was trained with the image encoder {trained_with.encoder or 'of unknown identity'} (feature "
            f"widths {trained_with.widths}), not with {configured.encoder} (feature widths {configured.widths}), which "
            "vision.encoder names"
        )
    return conditioning


class ImageConditioning(NamedTuple):
    """The frozen encoder of an adapter's images, and the trainable projection of the encoder's features."""

    encoder: EncoderInfo
    projection: ImageProjectionConfig


class ImageFeaturizer:
    """Turns a batch of image payloads into features on one device.

    With an encoder (`vision.mode=streamed`), the payloads are pixels, and this object loads and runs the encoder.
    Without one (`stored`), the payloads are precomputed features and are returned unchanged.
    """

    def __init__(self, info: EncoderInfo | None, device: torch.device | str) -> None:
        self.info = info
        if info is not None:
            self.encoder = load_vision_encoder(info.spec, device)

    def features(self, payloads: list[bytes]) -> Tensor:
        """Features (n, F) float32 of n payloads, float32 each: pixels (3, S, S) or features (F,)."""
        import numpy as np
        import torch

        numbers = torch.tensor(np.stack([np.frombuffer(payload, np.float32) for payload in payloads]))
        if self.info is None:
            return numbers
        side = self.info.preprocess.size
        return self.info.features(self.encoder, numbers.view(-1, 3, side, side))

    def images(self, payloads: list[bytes | None]) -> Images | None:
        """Features (n, F) and their rows (n,), given one payload or None per row; None if no row has an image."""
        import torch

        rows = [row for row, payload in enumerate(payloads) if payload is not None]
        if not rows:
            return None
        return self.features([payload for payload in payloads if payload is not None]), torch.tensor(rows)
