"""Settings of the job adapter-export."""

from typing import ClassVar, Literal

from rayjobs.config import config
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.paths import ModelPath


@config
class Config:
    """Settings of adapter-export."""

    JOB: ClassVar = "adapter-export"

    base: BaseModelConfig
    adapter: ModelPath
    """Adapter file, of this project's own format or of any that it reads."""
    format: Literal["v1", "litgpt", "peft"]
    """Format to write: `v1`, the official v1 file; `litgpt`, litgpt's adapter file; `peft`, a folder for PEFT, of
    prompts or of a LoRA."""
    gate: Literal["tanh", "identity"] = "identity"
    """For v1: the function that the reading code applies to gates, `identity` as the official inference code, or `tanh`
    as the official training code."""
    run: RunConfig
