"""Settings of the job cafo-features."""

from typing import ClassVar

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.data.config import FeaturesConfig
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.tune.search_space import Distinct


@config
class Config:
    """Settings of cafo-features."""

    JOB: ClassVar = "cafo-features"

    data: ImageDatasetConfig
    encoders: dict[str, VisionEncoderConfig] = Field(min_length=1)
    """Image encoders by name."""
    features: FeaturesConfig = FeaturesConfig()
    shots: int = Field(default=16, ge=0)
    """K: number of training images per class to encode, for every seed."""
    seeds: Distinct = Field(default=[1, 2, 3], min_length=1)
    """Seeds of the few-shot choices to encode."""
    generated: int = Field(default=0, ge=0)
    """K': number of generated images per class to encode."""
    plain: bool = False
    """Encode the training images without augmentation too. A choice without validation images needs them."""
    test: bool = False
    """Encode the test images too; without it they are not read."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig
