"""Settings of the job cafo-tune."""

from typing import ClassVar

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig, WorkerRange
from rayjobs.config import config
from rayjobs.data.config import FeaturesConfig
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.tune.search_space import SearchConfig, SpaceConfig


@config
class Config:
    """Settings of cafo-tune."""

    JOB: ClassVar = "cafo-tune"

    data: ImageDatasetConfig
    encoders: dict[str, VisionEncoderConfig] = Field(min_length=1)
    """Image encoders by name, as `space.encoders` refers to them; the first is the CLIP that computes p_ZS."""
    features: FeaturesConfig = FeaturesConfig()
    space: SpaceConfig = SpaceConfig()
    search: SearchConfig = SearchConfig()
    trials: WorkerPoolConfig = WorkerPoolConfig(workers=WorkerRange(min=2, max=2), gpus_per_worker=0)
    """Trials that run at the same time (`workers`), and what each reserves."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    """Workers that encode the images."""
    run: RunConfig
