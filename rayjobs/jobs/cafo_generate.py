"""Step 2 of CaFo: an image generator draws every class, and CLIP keeps the best K'.

The images come from a folder of drawn ones, an OpenAI-compatible endpoint, or `diffusers` on this machine. The list
under `generated/` is in CoOp's format, with scores and prompts; the same command goes on where it stopped.
"""

import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from cafo.files import read_json as read_json_file
from cafo.generate import DiffusersGenerator, EndpointGenerator, FolderGenerator, GenerationJob, ImageGenerator
from cafo.prompt import read_prompts, template_prompts, zero_shot_classifier
from rayjobs.cluster.device import default_device
from rayjobs.cluster.remote_model import load_on_gpu
from rayjobs.config import config
from rayjobs.console import Progress, show_result, show_table
from rayjobs.data.class_names import ClassNames, check_template, open_class_names
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.errors import UserError
from rayjobs.lifecycle import job
from rayjobs.models.encoder import VisionEncoderConfig, load_vision_encoder
from rayjobs.models.endpoint import EndpointConfig, endpoint_errors
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import read_jsonl, write_json, write_jsonl
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.storage.paths import AnyPath, resolve_path
from rayjobs.storage.sync import SyncedFolder

EXAMPLES = 24
"""Images that the report shows."""


@config
class DiffusersConfig:
    """A Stable Diffusion on this machine."""

    model: str
    """A folder in diffusers' format, which may be a URL, or a name on its hub; safetensors weights only."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps of each image."""


@config
class Step:
    """How images are drawn and chosen, whatever the classes."""

    source: Literal["folder", "endpoint", "diffusers"]
    """Where the images come from."""
    folder: AnyPath | None = None
    """Source folder: one folder of drawn images per class."""
    endpoint: EndpointConfig | None = None
    size: str = Field(default="256x256", pattern=r"^[1-9]\d*x[1-9]\d*$")
    """Width and height of an endpoint's images, in pixels."""
    diffusers: DiffusersConfig | None = None
    template: str | None = None
    """What is drawn, with {} for the class name; by default the first of the data set's templates."""
    prompts: AnyPath | None = None
    """JSON of sentences that candidates are scored against; by default data.prompts, or else the templates."""
    candidates: int = Field(default=16, ge=1)
    """Images drawn of each class."""
    keep: int = Field(default=8, ge=1)
    """K': the best of them, which are kept."""
    seed: int = Field(default=0, ge=0)
    """Of the drawing, where the generator takes one."""
    list_name: str = Field(default="dalle_generated.json", pattern=r"^\w[\w.\-]*\.json$")
    """The list's file name."""


@config
class Config(Step):
    JOB: ClassVar = "cafo-generate"

    data: ImageDatasetConfig | None = None
    class_names: list[str] | None = Field(default=None, min_length=1)
    """The classes as a plain list, instead of a data set."""
    clip: VisionEncoderConfig
    run: RunConfig

    @property
    def list_path(self) -> Path:
        return self.run.folder / "generated" / self.list_name

    @property
    def sentence_file(self) -> str | None:
        return self.prompts or (self.data.prompts if self.data is not None else None)

    def sentences(self, classes: ClassNames) -> dict[str, list[str]]:
        """What each class's candidates are scored against. Raises ValueError naming the classes without a sentence."""
        if self.sentence_file is not None:
            return read_prompts(resolve_path(self.sentence_file), classes.names)
        return template_prompts(classes.templates, classes.names)


def check(settings: Config) -> tuple[ClassNames, dict[str, Any]]:
    """Everything that can be told before CLIP is loaded and anything drawn: the classes, and what the images depend
    on. Raises ValueError.
    """
    if getattr(settings, settings.source) is None:
        needed = {"folder": "folder", "endpoint": "endpoint.model", "diffusers": "diffusers.model"}[settings.source]
        raise UserError(f"source is {settings.source}, so {needed} is required, but not given")
    if settings.keep > settings.candidates:
        raise UserError(f"keep must be at most the {settings.candidates} candidates, got {settings.keep}")
    if settings.clip.kind != "clip":
        raise UserError(
            f"clip.kind must be clip: only CLIP can score an image against a text; got {settings.clip.kind}"
        )
    classes = open_class_names(settings.data, settings.class_names)
    template = settings.template or classes.templates[0]
    check_template("template", template)
    settings.sentences(classes)
    source: dict[str, Any]
    if settings.source == "folder":
        source = {"folder": settings.folder}
        _check_folders(FolderGenerator(resolve_path(str(settings.folder))), classes)
    elif settings.source == "endpoint":
        assert settings.endpoint is not None
        settings.endpoint.open()
        source = {**settings.endpoint.identity(), "size": settings.size}
    else:
        assert settings.diffusers is not None
        if importlib.util.find_spec("diffusers") is None:
            raise UserError(
                "drawing locally needs the optional `diffusers` package; install the `diffusers` extra, or use another "
                "source"
            )
        source = {"model": settings.diffusers.model, "steps": settings.diffusers.steps}
    scored = file_fingerprint(settings.sentence_file) if settings.sentence_file else list(classes.templates)
    identity = {
        "source": settings.source,
        **source,
        "class_names": list(classes.names),  # images are kept by label
        "template": template,
        "scored_against": scored,
        "candidates": settings.candidates,
        "keep": settings.keep,
        "seed": settings.seed,
        "list_name": settings.list_name,
    }
    check_provenance(settings.run.folder / "source.json", identity)
    return classes, identity


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    classes, identity = check(settings)
    todo = len(classes.names) - len(_drawn(settings.list_path))
    rows = [
        ["source", settings.source],
        [
            "drawn",
            f"{todo} of {len(classes.names)} classes × {settings.candidates} candidates, the best {settings.keep}",
        ],
        ["for", identity["template"]],
        ["scored against", settings.sentence_file or "templates"],
        ["clip", f"{settings.clip.name} {settings.clip.weights}".strip()],
        ["out", str(settings.list_path)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Writes the images and their list, and why others were rejected; returns and writes `result.json`."""
    from cafo.encoders import ClipEncoder  # seconds

    classes, identity = check(settings)
    device = default_device()
    encoder = load_vision_encoder(settings.clip.spec(), device)
    assert isinstance(encoder, ClipEncoder)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / "source.json", identity)
    classifier = zero_shot_classifier(encoder, settings.sentences(classes), classes.names)
    before, log = len(_drawn(settings.list_path)), folder / "rejected.jsonl"
    with (
        endpoint_errors(settings.endpoint),
        SyncedFolder(settings.list_path.parent) as drawn,
        Progress("generate", unit="classes", total=len(classes.names), done=before) as bar,
    ):
        drawn.fetch(settings.list_name)

        def report(class_name: str, kept: int, rejected: list[str]) -> None:
            drawn.send(now=True)
            known = read_jsonl(log) if log.exists() else []  # a class that was drawn before in vain is told of once
            now = [{"class": class_name, "reason": reason} for reason in rejected]
            write_jsonl(log, [row for row in known if row["class"] != class_name] + now)
            bar.advance(note=f"{class_name}: kept {kept}" + (f", {len(rejected)} unusable" if rejected else ""))

        GenerationJob(
            generator=_generator(settings),
            encoder=encoder,
            classifier=classifier.weights,
            class_names=classes.names,
            template=identity["template"],
            folder=drawn.local,
            list_name=settings.list_name,
            candidates=settings.candidates,
            keep=settings.keep,
            seed=settings.seed,
        ).run(report)
    content = read_json_file(settings.list_path, "run the job again")
    if not content["train"]:
        raise UserError(f"not one usable image was drawn of any class; the reasons are in {log}")
    keep_examples(folder, settings.list_path.parent, content)
    per_class = [0] * len(classes.names)
    for _, label, _ in content["train"]:
        per_class[label] += 1
    result = {
        "headline": f"{len(content['train'])} images of {len(classes.names)} classes",
        "source": settings.source,
        "classes": len(classes.names),
        "classes_drawn_now": len(classes.names) - before,
        "images": len(content["train"]),
        "classes_short_of_keep": sum(count < settings.keep for count in per_class),
        "classes_without_images": [name for name, n in zip(classes.names, per_class, strict=True) if not n],
        "rejected_images": len(read_jsonl(log)),
        "sentences_truncated": len(classifier.truncated),
        "list": str(settings.list_path),
    }
    write_json(folder / "result.json", result)
    show_result(settings.run.name, result)
    return result


def keep_examples(folder: Path, images: Path, content: dict[str, Any]) -> None:
    """Small copies of kept images with CLIP's score, evenly drawn from the best of every class to the last."""
    ranked = sorted(content["train"], key=lambda entry: (Path(entry[0]).name, entry[1]))
    some = sorted(ranked[:: max(1, len(ranked) // EXAMPLES)][:EXAMPLES])
    shown = [(images / path, f"{name} ({content['scores'][path]:.3f})") for path, _, name in some]
    write_examples(folder, shown, f"Of the {len(ranked):,} images that were kept; in brackets CLIP's cosine.")


def _generator(settings: Config) -> ImageGenerator:
    if settings.source == "folder":
        return FolderGenerator(resolve_path(str(settings.folder)))
    if settings.source == "endpoint":
        assert settings.endpoint is not None
        return EndpointGenerator(settings.endpoint.open(), settings.size)
    assert settings.diffusers is not None
    drawn_by = settings.diffusers
    return load_on_gpu(lambda device: DiffusersGenerator(str(cached_path(drawn_by.model)), device, drawn_by.steps))


def _check_folders(generator: FolderGenerator, classes: ClassNames) -> None:
    problems = []
    for name in dict.fromkeys(classes.names):
        try:
            next(generator.generate(name, "", 0, 0), None)  # finds the folder and decodes no image
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n".join([*problems[:20], *more]))


def _drawn(path: Path) -> set[int]:
    """Labels of the classes that the list has."""
    return {entry[1] for entry in read_json_file(path, "")["train"]} if path.exists() else set()
