"""CaFo, step 2: generate images of every class and keep the K' that CLIP ranks best.

The images come from a folder, an OpenAI-compatible endpoint, or `diffusers` on this machine. The list of kept images in
`generated/` is in CoOp's format, with CLIP's scores and the prompts. The same command resumes an interrupted run with
the classes that the list lacks.
"""

from typing import Any

from cafo.dataset_checks import class_changes
from cafo.dataset_layouts import check_templates
from cafo.files import read_json as read_list
from cafo.prompt import zero_shot_classifier
from rayjobs.cluster.device import default_device
from rayjobs.console import show_result, show_table
from rayjobs.data.class_names import ClassNames, open_class_names
from rayjobs.errors import ConfigError, DataError, ProvenanceError
from rayjobs.inference.class_images import (
    generate_images,
    labels_in_list,
    write_image_examples,
)
from rayjobs.job_configs.cafo_generate import Config
from rayjobs.lifecycle import job
from rayjobs.models.encoder import load_vision_encoder
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import REJECTED_FILE, open_run
from rayjobs.storage.files import read_jsonl, read_object
from rayjobs.storage.fingerprint import file_fingerprint


def check(settings: Config) -> tuple[ClassNames, dict[str, Any]]:
    """Check everything that can be checked before CLIP is loaded and an image generated; return the classes and what
    the images depend on. Raises a UserError for the first problem."""
    if settings.clip.kind != "clip":
        raise ConfigError(
            f"clip.kind must be clip: only CLIP can score an image against a text; got {settings.clip.kind}"
        )
    classes = open_class_names(settings.data, settings.class_names)
    template = settings.template or classes.templates[0]
    check_templates([template])
    settings.descriptions(classes)
    file = settings.description_file
    identity = {
        "source": settings.source,
        **settings.check(classes),
        "class_names": list(classes.names),  # images are kept by label
        "template": template,
        "scored_against": file_fingerprint(file) if file else list(classes.templates),
        "candidates": settings.candidates,
        "keep": settings.keep,
        "seed": settings.seed,
        "list_name": settings.list_name,
    }
    source = settings.run.folder / "source.json"
    if source.exists() and (change := class_changes(read_object(source).get("class_names", []), classes.names)):
        raise ProvenanceError(
            f"{settings.run.folder} holds images of other classes ({change}): restore them, or choose another run.name"
        )
    check_provenance(source, identity)
    return classes, identity


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    classes, identity = check(settings)
    left, total = len(classes.names) - len(labels_in_list(settings.list_path)), len(classes.names)
    rows = [
        ["source", settings.source],
        ["to generate", f"{left} of {total} classes × {settings.candidates} candidates, the best {settings.keep} kept"],
        ["prompt", identity["template"]],
        ["scored against", settings.description_file or "templates"],
        ["clip", f"{settings.clip.name} {settings.clip.weights}".strip()],
        ["out", str(settings.list_path)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Write the images, their list, and why others were rejected; return and write `result.json`."""
    from cafo.encoders import ClipEncoder  # takes seconds to import

    classes, identity = check(settings)
    encoder = load_vision_encoder(settings.clip, default_device())
    assert isinstance(encoder, ClipEncoder)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / "source.json", identity)
    classifier = zero_shot_classifier(encoder, settings.descriptions(classes), classes.names)
    finished = len(labels_in_list(settings.list_path))
    generate_images(settings, classes, identity["template"], encoder, classifier.weights, settings.list_path)
    content = read_list(settings.list_path, "run the job again")
    if not content["train"]:
        raise DataError(f"no usable image was generated of any class; the reasons are in {folder / REJECTED_FILE}")
    write_image_examples(folder, settings.list_path, content)
    result = {
        "headline": f"{len(content['train'])} images of {len(classes.names)} classes",
        "source": settings.source,
        **count_images(classes, content, settings.keep, finished),
        "rejected_images": len(read_jsonl(folder / REJECTED_FILE)),
        "sentences_truncated": len(classifier.truncated),
        "list": str(settings.list_path),
    }
    write_result(folder, result)
    show_result(settings.run.name, result)
    return result


def count_images(classes: ClassNames, content: dict[str, Any], keep: int, finished: int) -> dict[str, Any]:
    """Numbers of images and classes in the list, for the result. `finished` classes were in it before this run."""
    per_class = [0] * len(classes.names)
    for _, label, _ in content["train"]:
        per_class[label] += 1
    return {
        "classes": len(classes.names),
        "classes_drawn_now": len(classes.names) - finished,
        "images": len(content["train"]),
        "classes_short_of_keep": sum(count < keep for count in per_class),
        "classes_without_images": [name for name, n in zip(classes.names, per_class, strict=True) if not n],
    }
