"""Settings of the job demo."""

from typing import ClassVar

from pydantic import Field

from rayjobs.config import config
from rayjobs.demo.config import AdaptersConfig, CascadeConfig, PretrainedConfig, WorldConfig
from rayjobs.runs.run_dir import FolderName, RunConfig
from rayjobs.storage.paths import LocalPath


@config
class DemoRun(RunConfig):
    """The demo's run folder and cache."""

    name: FolderName = "demo"
    """Name of the run; its folder is `storage/name`."""
    storage: LocalPath = "runs"
    """Folder of all runs."""
    cache: LocalPath | None = None
    """Folder of prepared data, which runs share; null for `storage/cache`."""


@config
class Config:
    """Settings of demo."""

    JOB: ClassVar = "demo"

    world: WorldConfig = WorldConfig()
    cafo: CascadeConfig = CascadeConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    pretrained: PretrainedConfig = PretrainedConfig()
    run: DemoRun = Field(default_factory=DemoRun)  # the default folder is relative to where the demo is run
