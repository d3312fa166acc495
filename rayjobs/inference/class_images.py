"""Generate images of classes, and keep those that CLIP ranks best: where they come from, and their list."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cafo.files import read_json
from rayjobs.cluster.remote_model import load_on_gpu
from rayjobs.config import config
from rayjobs.console import Progress
from rayjobs.data.class_names import ClassNames
from rayjobs.errors import ConfigError, DataError
from rayjobs.models.endpoint import EndpointConfig, endpoint_errors
from rayjobs.runs.run_dir import REJECTED_FILE
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import read_jsonl, write_jsonl
from rayjobs.storage.paths import AnyPath, resolve_path
from rayjobs.storage.sync import SyncedFolder

if TYPE_CHECKING:
    from torch import Tensor

    from cafo.encoders import ClipEncoder
    from cafo.generate import FolderGenerator, ImageGenerator

EXAMPLES = 24
"""Images that the report shows."""


@config
class DiffusersConfig:
    """A Stable Diffusion model on this machine, or on a GPU of the cluster."""

    model: str
    """Folder or URL in diffusers' format, or a name on its hub; only safetensors weights are read."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps per image."""


@config
class ImageGenerationConfig:
    """The source of generated images, and the number of them that are kept."""

    source: Literal["folder", "endpoint", "diffusers"]
    """Source of the images: a `folder` of generated images, an OpenAI-compatible `endpoint`, or `diffusers` on this
    machine."""
    folder: AnyPath | None = None
    """For source=folder: a folder with a subfolder of generated images for each class."""
    endpoint: EndpointConfig | None = None
    size: str = Field(default="256x256", pattern=r"^[1-9]\d*x[1-9]\d*$")
    """For source=endpoint: width and height of the images in pixels."""
    diffusers: DiffusersConfig | None = None
    template: str | None = None
    """Prompt of the generator, with {} for the class name; null uses the first of the data set's templates."""
    prompts: AnyPath | None = None
    """JSON of the descriptions that CLIP scores the images against; null uses data.prompts, or else the templates."""
    candidates: int = Field(default=16, ge=1)
    """Images generated per class."""
    keep: int = Field(default=8, ge=1)
    """K': images kept per class, the best ones."""
    seed: int = Field(default=0, ge=0)
    """Generation seed, if the generator takes one."""
    list_name: str = Field(default="dalle_generated.json", pattern=r"^\w[\w.\-]*\.json$")
    """File name of the list of kept images."""

    def check(self, classes: ClassNames) -> dict[str, Any]:
        """Check the source; return what the generated images depend on in it.

        Raises ConfigError or DataError for a section, a package or a class's folder that is missing.
        """
        from cafo.generate import FolderGenerator

        if getattr(self, self.source) is None:
            needed = {"folder": "folder", "endpoint": "endpoint.model", "diffusers": "diffusers.model"}[self.source]
            raise ConfigError(f"source is {self.source}, so {needed} is required, but not given")
        if self.keep > self.candidates:
            raise ConfigError(f"keep must be at most the {self.candidates} candidates, got {self.keep}")
        if self.source == "folder":
            check_folders(FolderGenerator(resolve_path(str(self.folder))), classes)
            return {"folder": self.folder}
        if self.source == "endpoint":
            assert self.endpoint is not None
            self.endpoint.open()
            return {**self.endpoint.identity(), "size": self.size}
        assert self.diffusers is not None
        if importlib.util.find_spec("diffusers") is None:
            raise ConfigError(
                "generating images locally needs the optional `diffusers` package; install the `diffusers` extra, or "
                "use another source"
            )
        return {"model": self.diffusers.model, "steps": self.diffusers.steps}

    def generator(self) -> ImageGenerator:
        """The source of images, with its model loaded."""
        from cafo.generate import DiffusersGenerator, EndpointGenerator, FolderGenerator

        if self.source == "folder":
            return FolderGenerator(resolve_path(str(self.folder)))
        if self.source == "endpoint":
            assert self.endpoint is not None
            return EndpointGenerator(self.endpoint.open(), self.size)
        assert self.diffusers is not None
        model, steps = self.diffusers.model, self.diffusers.steps
        return load_on_gpu(lambda device: DiffusersGenerator(str(cached_path(model)), device, steps))


def check_folders(generator: FolderGenerator, classes: ClassNames) -> None:
    """Raise DataError naming the classes without a folder, at most twenty of them."""
    problems = []
    for name in dict.fromkeys(classes.names):
        try:
            next(generator.generate(name, "", 0, 0), None)  # finds the folder and decodes no image
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise DataError("\n".join([*problems[:20], *more]))


def labels_in_list(path: Path) -> set[int]:
    """Labels of the classes whose images are in the list; none if there is no list yet."""
    return {label for _, label, _ in read_json(path, "run the job again")["train"]} if path.exists() else set()


def generate_images(
    settings: ImageGenerationConfig,
    classes: ClassNames,
    template: str,
    encoder: ClipEncoder,
    classifier: Tensor,
    list_path: Path,
) -> None:
    """Generate the images of the classes that the list lacks, and write the list after every class.

    Images that cannot be used are named with their reasons in `rejected.jsonl`, in the folder above the list's.

    Args:
        template: the generator's prompt.
        classifier: W (C, N), the class texts that images are scored against.
    """
    from cafo.generate import GenerationJob

    log = list_path.parent.parent / REJECTED_FILE
    finished = len(labels_in_list(list_path))
    with (
        endpoint_errors(settings.endpoint),
        SyncedFolder(list_path.parent) as folder,
        Progress("generate", unit="classes", total=len(classes.names), done=finished) as bar,
    ):
        folder.fetch(settings.list_name)

        def report(class_name: str, kept: int, rejected: list[str]) -> None:
            folder.send(now=True)
            _log_rejected(log, class_name, rejected)
            bar.advance(note=f"{class_name}: kept {kept}" + (f", {len(rejected)} unusable" if rejected else ""))

        GenerationJob(
            generator=settings.generator(),
            encoder=encoder,
            classifier=classifier,
            class_names=classes.names,
            template=template,
            folder=folder.local,
            list_name=settings.list_name,
            candidates=settings.candidates,
            keep=settings.keep,
            seed=settings.seed,
        ).run(report)


def _log_rejected(log: Path, class_name: str, reasons: list[str]) -> None:
    """Replace the reasons of one class: a class without a usable image is generated again in the next run."""
    others = [row for row in read_jsonl(log) if row["class"] != class_name] if log.exists() else []
    write_jsonl(log, others + [{"class": class_name, "reason": reason} for reason in reasons])


def write_image_examples(folder: Path, list_path: Path, content: dict[str, Any]) -> None:
    """Write small copies of kept images with their CLIP score: some of every class's best, second best, and so on."""
    from rayjobs.reporting.example_gallery import write_examples

    ranked = sorted(content["train"], key=lambda entry: (Path(entry[0]).name, entry[1]))
    some = sorted(ranked[:: max(1, len(ranked) // EXAMPLES)][:EXAMPLES])
    examples = [(list_path.parent / path, f"{name} ({content['scores'][path]:.3f})") for path, _, name in some]
    write_examples(folder, examples, f"Of the {len(ranked):,} images that were kept; in brackets CLIP's cosine.")
