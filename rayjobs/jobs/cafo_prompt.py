"""Step 1 of CaFo: a language model describes the classes of a data set, and `prompts.json` keeps what it says.

The sentences come from a file in CaFo's format, an OpenAI-compatible endpoint, a local LLaMA with or without an
adapter, or from the templates alone. The same command goes on where it stopped: no class is asked about twice.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from cafo.files import read_json as read_json_file
from cafo.prompt import (
    ANSWERS,
    COMMANDS,
    EndpointModel,
    LanguageModel,
    Sampling,
    describe_classes,
    read_prompts,
    template_prompts,
)
from rayjobs.cluster.remote_model import load_on_gpu
from rayjobs.config import config
from rayjobs.console import Progress, show_result, show_table
from rayjobs.data.class_names import ClassNames, check_template, open_class_names
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.errors import UserError
from rayjobs.inference.class_descriptions import LlamaConfig, LlamaModel, SamplingConfig
from rayjobs.lifecycle import job
from rayjobs.models.endpoint import EndpointConfig, endpoint_errors
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import write_json
from rayjobs.storage.paths import AnyPath, resolve_path
from rayjobs.storage.sync import SyncedFolder

PROMPTS = "prompts.json"


@config
class Step:
    """Who describes the classes and how, whatever the classes."""

    source: Literal["file", "endpoint", "llama", "templates"]
    """Where the sentences come from."""
    file: AnyPath | None = None
    """Source file: JSON {class name: [sentence, …]}, checked and copied."""
    endpoint: EndpointConfig | None = None
    llama: LlamaConfig | None = None
    commands: list[str] = Field(default=list(COMMANDS), min_length=1)
    """What an endpoint or a LLaMA is asked about each class, with {} for its name."""
    answers: int = Field(default=ANSWERS, ge=1)
    """Answers to each command."""
    sampling: SamplingConfig = SamplingConfig()


@config
class Config(Step):
    JOB: ClassVar = "cafo-prompt"

    data: ImageDatasetConfig | None = None
    class_names: list[str] | None = Field(default=None, min_length=1)
    """The classes as a plain list, instead of a data set."""
    run: RunConfig


def check(settings: Config) -> tuple[ClassNames, dict[str, Any]]:
    """Everything that can be told before a model is loaded or asked: the classes, and what the answers depend on.

    Raises ValueError.
    """
    if settings.source != "templates" and getattr(settings, settings.source) is None:
        needed = {"file": "file", "endpoint": "endpoint.model", "llama": "llama.base.path"}[settings.source]
        raise UserError(f"source is {settings.source}, so {needed} is required, but not given")
    classes = open_class_names(settings.data, settings.class_names)
    identity: dict[str, Any] = {"source": settings.source}
    if settings.source == "file":
        read_prompts(resolve_path(str(settings.file)), classes.names)
    elif settings.source != "templates":
        for command in settings.commands:
            check_template("command", command)
        sampling = settings.sampling
        identity |= {"commands": settings.commands, "answers": settings.answers}
        identity |= {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        if settings.source == "endpoint":
            assert settings.endpoint is not None
            settings.endpoint.open()
            identity |= {**settings.endpoint.identity(), "system": sampling.system}
        else:
            assert settings.llama is not None
            identity |= settings.llama.identity()
    check_provenance(settings.run.folder / "source.json", identity)
    return classes, identity


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    classes, _ = check(settings)
    path = settings.run.folder / PROMPTS
    rows = [["source", settings.source], ["classes", str(len(classes.names))], ["out", str(path)]]
    if settings.source in ("endpoint", "llama"):
        asked = len(classes.missing(_known(path)))
        rows.append(["asked", f"{asked} classes × {len(settings.commands)} commands × {settings.answers} answers"])
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Writes `prompts.json`; returns and writes `result.json`."""
    classes, identity = check(settings)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / "source.json", identity)
    path = folder / PROMPTS
    asked = 0
    if settings.source == "file":
        prompts = read_prompts(resolve_path(str(settings.file)), classes.names)
        write_json(path, prompts)
    elif settings.source == "templates":
        prompts = template_prompts(classes.templates, classes.names)
        write_json(path, prompts)
    else:
        asked = len(classes.missing(_known(path)))
        prompts = _asked(settings, classes, path) if asked else read_prompts(path, classes.names)
    result = {
        "headline": f"{sum(map(len, prompts.values()))} sentences about {len(classes.names)} classes",
        "source": settings.source,
        "classes": len(classes.names),
        "classes_asked_now": asked,
        "sentences": sum(map(len, prompts.values())),
        "prompts": str(path),
    }
    write_json(folder / "result.json", result)
    show_result(settings.run.name, result)
    return result


def _asked(settings: Config, classes: ClassNames, path: Path) -> dict[str, list[str]]:
    names = list(dict.fromkeys(classes.names))
    model = _model(settings)
    described = len(names) - len(classes.missing(_known(path)))
    with (
        endpoint_errors(settings.endpoint),
        SyncedFolder(path.parent) as grown,
        Progress("prompt", unit="classes", total=len(names), done=described) as bar,
    ):

        def report(name: str, sentences: int) -> None:
            grown.send(now=True)
            bar.advance(note=f"{name}: {sentences} sentences")

        return describe_classes(
            model, names, grown.fetch(path.name), commands=settings.commands, answers=settings.answers, report=report
        )


def _model(settings: Config) -> LanguageModel:
    sampling = settings.sampling
    if settings.source == "endpoint":
        assert settings.endpoint is not None
        drawn = Sampling(temperature=sampling.temperature, max_tokens=sampling.max_tokens, system=sampling.system)
        return EndpointModel(settings.endpoint.open(), drawn)
    assert settings.llama is not None
    llama, commands = settings.llama, settings.commands
    return load_on_gpu(lambda device: LlamaModel(llama.base.load(llama.adapter, device), llama, sampling, commands))


def _known(path: Path) -> dict[str, list[str]]:
    return read_json_file(path, "remove it to ask again") if path.exists() else {}
