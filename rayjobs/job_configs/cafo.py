"""Settings of the job cafo."""

from typing import ClassVar

from pydantic import Field

from rayjobs.config import config
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.inference.class_descriptions import DescriptionConfig
from rayjobs.inference.class_images import ImageGenerationConfig
from rayjobs.job_configs.cafo_tune import Config as CafoTuneConfig
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.run_dir import FolderName


@config
class GenerateStep(ImageGenerationConfig):
    """Images of the classes, generated and ranked by CLIP."""

    clip: VisionEncoderConfig | None = None
    """CLIP that ranks the generated images; null uses the first of `encoders`."""


@config
class Config(CafoTuneConfig):
    """Settings of cafo."""

    JOB: ClassVar = "cafo"

    prompt: DescriptionConfig | None = None
    """Describe the classes first, in the run's subfolder `prompt`; null uses data.prompts as it is."""
    generate: GenerateStep | None = None
    """Generate images next, in the run's subfolder `generate`; null uses data.generated as it is."""
    targets: dict[FolderName, ImageDatasetConfig] = Field(default_factory=dict)
    """Other test sets with the same classes, by name, to measure distribution shift."""
    reference: str | None = None
    """Row of the table that others are compared with, seed by seed. Null compares with `CaFo` or, if no row has this
    name, with the best of CaFo's rows on the images of the choice at the most shots."""
    plots: bool = True
    """Write plots: accuracy over shots, the search landscape of α and β, which source weighs most."""
