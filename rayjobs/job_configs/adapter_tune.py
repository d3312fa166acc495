"""Settings of the job adapter-tune."""

from typing import ClassVar

from rayjobs.config import config
from rayjobs.job_configs.adapter_train import Config as AdapterTrainConfig
from rayjobs.tune.sweep_config import SweepConfig


@config
class Config(AdapterTrainConfig):
    """Settings of adapter-tune."""

    JOB: ClassVar = "adapter-tune"

    sweep: SweepConfig
