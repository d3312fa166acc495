"""Settings of the job cafo-generate."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from cafo.prompt import read_prompts, template_prompts
from rayjobs.config import config
from rayjobs.data.class_names import ClassNames
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.inference.class_images import ImageGenerationConfig
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.paths import resolve_path


@config
class Config(ImageGenerationConfig):
    """Settings of cafo-generate."""

    JOB: ClassVar = "cafo-generate"

    data: ImageDatasetConfig | None = None
    class_names: list[str] | None = Field(default=None, min_length=1)
    """Class names as a plain list, instead of a data set."""
    clip: VisionEncoderConfig
    run: RunConfig

    @property
    def list_path(self) -> Path:
        return self.run.folder / "generated" / self.list_name

    @property
    def description_file(self) -> str | None:
        return self.prompts or (self.data.prompts if self.data is not None else None)

    def descriptions(self, classes: ClassNames) -> dict[str, list[str]]:
        """The descriptions of each class, which its images are scored against.

        Raises an error that names the classes without one.
        """
        if self.description_file is not None:
            return read_prompts(resolve_path(self.description_file), classes.names)
        return template_prompts(classes.templates, classes.names)
