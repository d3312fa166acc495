"""Step 1 of CaFo: a language model describes the classes of a data set, and `prompts.json` keeps what it says.

The sentences come from a file in CaFo's format, an OpenAI-compatible endpoint, a local LLaMA with or without an
adapter, or from the templates alone. The same command goes on where it stopped: no class is asked about twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from adapter.base import Base
from adapter.checkpoint import read_adapter
from adapter.instruct import ALPACA, PromptTemplate
from cafo.files import read_json as read_json_file
from cafo.prompt import (
    ANSWERS,
    COMMANDS,
    EndpointModel,
    LanguageModel,
    Sampling,
    describe_classes,
    read_prompts,
    spoken,
    template_prompts,
)
from rayjobs.base import BaseConfig
from rayjobs.config import config
from rayjobs.gpu import on_gpu
from rayjobs.imagery import ImagesConfig
from rayjobs.places import AnyPath, FileOrName, Growing, local_copy, place
from rayjobs.provenance import check_source, claim_source
from rayjobs.report import show_table
from rayjobs.runs import recorded
from rayjobs.runtime import Progress, RunConfig, open_run
from rayjobs.sources import Classes, EndpointConfig, asking, check_sentence, open_classes
from rayjobs.tables import sha256_file, write_json

PROMPTS = "prompts.json"


@config
class LlamaConfig:
    """A LLaMA on this machine."""

    base: BaseConfig
    adapter: AnyPath | None = None
    """An adapter file: ours, official v1, litgpt or PEFT; null asks the bare base."""
    template: FileOrName = "alpaca"
    """'alpaca', or a JSON file with 'with_input' and 'without_input' prompt templates."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that hold this much probability."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    batch_size: int = Field(default=64, ge=1)
    """Answers decoded together; all commands of a class share its batches."""

    def prompt_template(self) -> PromptTemplate:
        return ALPACA if self.template == "alpaca" else PromptTemplate.read(local_copy(self.template))

    def identity(self) -> dict[str, Any]:
        """What the answers depend on. Raises ValueError for a base, adapter or template that cannot be read."""
        checkpoint, tokenizer = self.base.open()
        if self.adapter is not None:
            read_adapter(local_copy(self.adapter))
        template = self.prompt_template()
        return {
            "base": checkpoint.fingerprint,
            "tokenizer": sha256_file(tokenizer),
            "dtype": self.base.dtype,
            "adapter": sha256_file(local_copy(self.adapter)) if self.adapter is not None else None,
            "template": [template.with_input, template.without_input],
            "top_p": self.top_p,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


@config
class SamplingConfig:
    """How the answers of an endpoint or a LLaMA are drawn."""

    temperature: float = Field(default=0.99, ge=0)
    """High, so that ten answers are ten descriptions; 0 is greedy."""
    max_tokens: int = Field(default=50, ge=1)
    """The longest answer; CLIP's window holds 77 of its own tokens."""
    system: str = Sampling.system
    """What an endpoint is told before each command."""


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
    data: ImagesConfig | None = None
    class_names: list[str] | None = Field(default=None, min_length=1)
    """The classes as a plain list, instead of a data set."""
    run: RunConfig


class LlamaModel:
    """A `LanguageModel` on this machine: the first command about a class decodes its answers to all of them."""

    def __init__(self, base: Base, settings: LlamaConfig, sampling: SamplingConfig, commands: Sequence[str]) -> None:
        self._base, self._settings, self._sampling = base, settings, sampling
        self._commands, self._template = list(dict.fromkeys(commands)), settings.prompt_template()
        self._decoded: tuple[tuple[str, int] | None, dict[str, list[str]]] = (None, {})

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """`n` answers to the command as an instruction; they depend on nothing that was asked before."""
        if self._decoded[0] != (class_name, n):
            self._decoded = ((class_name, n), self._decode(class_name, n))
        return self._decoded[1][command]

    def _decode(self, class_name: str, n: int) -> dict[str, list[str]]:
        asked = [command for command in self._commands for _ in range(n)]
        prompts = [self._template.render(command.format(spoken(class_name))) for command in asked]
        told: dict[str, list[str]] = {command: [] for command in self._commands}
        size = self._settings.batch_size
        for start in range(0, len(prompts), size):
            texts = self._base.generate(
                prompts[start : start + size],
                max_new_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                top_p=self._settings.top_p,
                # Equal prompts of one batch draw apart by themselves; those of two batches need two seeds.
                seed=self._settings.seed * 1_000_003 + start,
            )
            for command, text in zip(asked[start : start + size], texts, strict=True):
                told[command].append(text.strip())
        return told


def check(settings: Config) -> tuple[Classes, dict[str, Any]]:
    """Everything that can be told before a model is loaded or asked: the classes, and what the answers depend on.

    Raises ValueError.
    """
    if settings.source != "templates" and getattr(settings, settings.source) is None:
        needed = {"file": "file", "endpoint": "endpoint.model", "llama": "llama.base.path"}[settings.source]
        raise ValueError(f"source is {settings.source}, so {needed} is required, but not given")
    classes = open_classes(settings.data, settings.class_names)
    identity: dict[str, Any] = {"source": settings.source}
    if settings.source == "file":
        read_prompts(place(str(settings.file)), classes.names)
    elif settings.source != "templates":
        for command in settings.commands:
            check_sentence("command", command)
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
    check_source(settings.run.folder / "source.json", identity)
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


@recorded
def run(settings: Config) -> dict[str, Any]:
    """Writes `prompts.json`; returns and writes `result.json`."""
    classes, identity = check(settings)
    folder = open_run(settings.run, settings)
    claim_source(folder / "source.json", identity)
    path = folder / PROMPTS
    asked = 0
    if settings.source == "file":
        prompts = read_prompts(place(str(settings.file)), classes.names)
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
    show_table(settings.run.name, ["", ""], [[name.replace("_", " "), str(value)] for name, value in result.items()])
    return result


def _asked(settings: Config, classes: Classes, path: Path) -> dict[str, list[str]]:
    names = list(dict.fromkeys(classes.names))
    model = _model(settings)
    described = len(names) - len(classes.missing(_known(path)))
    with (
        asking(settings.endpoint),
        Growing(path.parent) as grown,
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
    return on_gpu(lambda device: LlamaModel(llama.base.load(llama.adapter, device), llama, sampling, commands))


def _known(path: Path) -> dict[str, list[str]]:
    return read_json_file(path, "remove it to ask again") if path.exists() else {}
