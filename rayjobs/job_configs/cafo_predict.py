"""Settings of the job cafo-predict."""

from typing import ClassVar, Literal

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.data.image_collection import ImageCollectionConfig
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.paths import AnyPath


@config
class Config:
    """Settings of cafo-predict."""

    JOB: ClassVar = "cafo-predict"

    classifier: AnyPath
    """Run folder of cafo-tune or cafo, of which the classifier with the highest accuracy on the images of its choice is
    taken; or a .safetensors file that CaFo.save wrote."""
    method: str | None = None
    """Method among those that the run compares, as its tables call it; null for the best."""
    shots: int | None = None
    """K of the classifier; null for the best."""
    seed: int | None = None
    """Few-shot seed of the classifier; null for the best."""
    encoders: dict[str, VisionEncoderConfig] = Field(default_factory=dict)
    """Image encoders by name: needed for a .safetensors file. Those of a run are known, and may be replaced here, for
    example where the weights were moved."""
    data: ImageCollectionConfig
    top: int = Field(default=5, ge=1)
    """Number of classes to write for each image; all, if the classifier has fewer."""
    coverage: float | None = Field(default=None, gt=0, lt=1)
    """Also write prediction sets: the classes among which an image's own is with this probability, such as 0.9."""
    format: Literal["parquet", "csv"] = "parquet"
    """Format of the predictions: parquet or csv."""
    batch: int = Field(default=64, ge=1)
    """Images that an encoder encodes at once."""
    images_per_shard: int = Field(default=512, ge=1)
    """Images of one file of predictions, which are decoded by one task and are lost by an interruption."""
    retry_rejected: bool = False
    """Try images again that were rejected before, for example because a server did not answer."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    """Workers that hold the encoders and the classifier."""
    run: RunConfig
