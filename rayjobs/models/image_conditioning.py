"""Which tower reads the images of an adapter, and what becomes of them on the way to its workers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from adapter.adapter_checkpoint import read_adapter
from adapter.image_projection import ImageProjectionConfig as Projected
from adapter.image_projection import Images
from rayjobs.config import config
from rayjobs.errors import UserError
from rayjobs.models.encoder import EncoderInfo, VisionEncoderConfig, load_vision_encoder
from rayjobs.storage.paths import cached_path


@config
class VisionConfig:
    """How images are read; without this section, training leaves them out."""

    tower: VisionEncoderConfig
    """The frozen tower; the adapter keeps its identity, and is refused with another."""
    scales: int = Field(default=4, ge=1)
    """Of a ViT: its class token after so many evenly spaced blocks. Of other towers: all stages and the embedding."""
    bottleneck: int = Field(default=72, ge=1)
    """Hidden width of the projection; 72 makes it about 0.6 M parameters at 7B."""
    mode: Literal["stored", "streamed"] = "stored"
    """stored: each image is encoded once and kept, workers hold no tower; streamed: workers hold the tower and encode
    decoded images as they come."""
    augment: bool = False
    """Train on another random view of an image in every epoch; streamed only."""
    min_area: float = Field(default=0.5, gt=0, le=1)
    """The smallest share of an image that such a view shows; near 1 where a question may be about any part of it."""
    flips: bool = False
    """Mirror half of the views: only where no question is about left and right, letters or digits."""
    batch: int = Field(default=64, ge=1)
    """Images that the tower reads at once."""

    def open(self) -> ImageConditioning:
        """The tower's identity and widths, by loading it once. Raises ValueError for one that does not load."""
        if self.augment and self.mode == "stored":
            raise UserError("vision.augment needs vision.mode=streamed: stored features are of images as they are")
        held = load_vision_encoder(self.tower.spec())
        side = held.preprocess.size
        widths = tuple(scale.shape[1] for scale in held.multi_scale(torch.zeros(1, 3, side, side), self.scales))
        identity = f"{held.identity}-{len(widths)}scales"
        tower = EncoderInfo(self.tower.spec(), identity, held.preprocess, False, self.scales, self.batch)
        projected = Projected(
            widths=widths, bottleneck=self.bottleneck, tower=tower.identity, preprocess=repr(held.preprocess)
        )
        return ImageConditioning(tower, projected)


def open_image_conditioning(adapter: str | None, vision: VisionConfig | None, blind: bool) -> ImageConditioning | None:
    """The tower of an adapter that reads images, proven to be its own; None where images are left out.

    Raises ValueError for an adapter that cannot be read, for a tower that is not its own or that it has no use for, and
    for an adapter that reads images and is given no tower, unless it is to be `blind`.
    """
    reads = None if adapter is None else read_adapter(cached_path(adapter)).vision
    if blind:
        return None
    if vision is None:
        if reads is None:
            return None
        raise UserError(
            f"{adapter} reads images, through the tower {reads.tower or 'that it was trained with'} "
            f"({reads.preprocess}): name it in vision.tower, or set blind=true to leave images out"
        )
    if reads is None:
        raise UserError(
            f"{adapter or 'a bare base'} cannot read images: leave out vision, or name an adapter trained with it"
        )
    sight = vision.open()
    theirs, ours = (reads.tower, reads.widths), (sight.projection.tower, sight.projection.widths)
    if theirs[1] != ours[1] or theirs[0] not in ("", ours[0]):
        raise UserError(f"{adapter} was trained with the image tower {theirs}, not with {ours}, which vision names")
    return sight


class ImageConditioning(NamedTuple):
    """An adapter's tower: how to load it, and what the adapter has to know."""

    tower: EncoderInfo
    projection: Projected


class ImageFeaturizer:
    """What a worker sees with: the tower itself where images come as pixels, nothing where they come as features."""

    def __init__(self, tower: EncoderInfo | None, device: torch.device | str) -> None:
        self.tower = tower
        if tower is not None:
            self.encoder = load_vision_encoder(tower.spec, device)

    def features(self, payloads: list[bytes]) -> Tensor:
        """What `Pictures` read of n images → features (n, F)."""
        numbers = torch.tensor(np.stack([np.frombuffer(payload, np.float32) for payload in payloads]))
        if self.tower is None:
            return numbers
        side = self.tower.preprocess.size
        return self.tower.features(self.encoder, numbers.view(-1, 3, side, side))

    def images(self, payloads: list[bytes | None]) -> Images | None:
        """One payload or None per row → the batch's features and their rows; None where no row has an image."""
        rows = [row for row, payload in enumerate(payloads) if payload is not None]
        if not rows:
            return None
        return self.features([payload for payload in payloads if payload is not None]), torch.tensor(rows)
