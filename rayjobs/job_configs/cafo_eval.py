"""Settings of the job cafo-eval."""

from typing import ClassVar

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.runs.run_dir import FolderName
from rayjobs.storage.paths import AnyPath


@config
class Config:
    """Settings of cafo-eval."""

    JOB: ClassVar = "cafo-eval"

    sweep: AnyPath
    """Run folder of a cafo-tune sweep; the results are written into its subfolder `test`."""
    targets: dict[FolderName, ImageDatasetConfig] = Field(default_factory=dict)
    """Other test sets with the same classes, by name, to measure distribution shift."""
    reference: str | None = None
    """Row of the table that others are compared with, seed by seed. Null compares with `CaFo` or, if no row has this
    name, with the best of CaFo's rows on the images of the choice at the most shots."""
    plots: bool = True
    """Write plots: accuracy over shots, the search landscape of α and β, which source weighs most."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    """Workers that encode the test images."""
