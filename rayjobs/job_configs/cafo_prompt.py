"""Settings of the job cafo-prompt."""

from typing import ClassVar

from pydantic import Field

from rayjobs.config import config
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.inference.class_descriptions import DescriptionConfig
from rayjobs.runs.run_dir import RunConfig


@config
class Config(DescriptionConfig):
    """Settings of cafo-prompt."""

    JOB: ClassVar = "cafo-prompt"

    data: ImageDatasetConfig | None = None
    class_names: list[str] | None = Field(default=None, min_length=1)
    """Class names as a plain list, instead of a data set."""
    run: RunConfig
