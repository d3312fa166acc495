"""Settings of image features."""

from pydantic import Field

from rayjobs.config import config


@config
class FeaturesConfig:
    """Augmented views of the training images, and how images are encoded."""

    views: int = Field(default=10, ge=1)
    """Augmented views of every training image. A trial may use the first few of them."""
    seed: int = 0
    """Seed of the augmented views."""
    min_area: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of an image's area that a view shows. Use a value near 1 where the class depends on the whole
    layout of the image."""
    flips: bool = True
    """Mirror half of the views. Switch it off where the mirror image belongs to another class or to none, as with
    letters and digits."""
    batch: int = Field(default=64, ge=1)
    """Views that an encoder encodes at once."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of the images of a list cannot be read."""
