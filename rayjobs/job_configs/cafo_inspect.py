"""Settings of the job cafo-inspect."""

from typing import ClassVar

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.storage.paths import AnyPath


@config
class Config:
    """Settings of cafo-inspect."""

    JOB: ClassVar = "cafo-inspect"

    sweep: AnyPath
    """Run folder of cafo-tune or cafo; the findings are written into its subfolder `inspect`."""
    shots: int | None = None
    """K of the cache to inspect; null takes the best choice."""
    method: str | None = None
    """The cache's method, by the name of its table row; null takes the best choice."""
    seed: int | None = None
    """Seed of the cache to inspect; null takes the first."""
    images: AnyPath | None = None
    """Image, or folder of images, whose predictions are explained; null explains mistakes and right answers on held-out
    images."""
    unlabelled: AnyPath | None = None
    """Folder of images without labels, of which those worth labelling next are chosen."""
    next_labels: int = Field(default=24, ge=1)
    """Number of images to choose from `unlabelled`."""
    duplicate_cosine: float = Field(default=0.9, gt=0, le=1)
    """Smallest cosine, under every encoder, of two images that are listed as near-duplicates."""
    most_duplicates: int = Field(default=10_000, ge=1)
    """Largest number of near-duplicates that are listed; all are counted."""
    test: bool = False
    """Compare the test images too, for near-duplicates alone: by their features, without their labels."""
    votes: int = Field(default=6, ge=1)
    """Keys that are named for each explained image."""
    shown: int = Field(default=12, ge=1)
    """Pictures of each kind in the report; the CSV files have all findings."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    """Workers that encode images whose features are not stored yet."""
