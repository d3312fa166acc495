"""Describe classes with a language model: an endpoint, or a LLaMA on this machine, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from adapter.templates import Template, template_fields
from adapter.tokenizers.base import Tokenizer
from cafo.dataset_layouts import check_templates
from cafo.files import read_json
from cafo.prompt import ANSWERS, COMMANDS, EndpointModel, LanguageModel, Sampling, describe_classes, with_spaces
from rayjobs.cluster.remote_model import load_on_gpu
from rayjobs.config import config
from rayjobs.console import Progress
from rayjobs.data.class_names import ClassNames
from rayjobs.data.templates import saved_template
from rayjobs.errors import ConfigError
from rayjobs.models.base_model import BaseModelConfig, open_tokenizer
from rayjobs.models.endpoint import EndpointConfig, endpoint_errors
from rayjobs.storage.download import cached_path
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.storage.paths import AnyPath, FileOrName, ModelPath
from rayjobs.storage.sync import SyncedFolder

if TYPE_CHECKING:
    from adapter.model import AdaptedModel


@config
class LlamaDescriberConfig:
    """A LLaMA on this machine, or on a GPU of the cluster."""

    base: BaseModelConfig
    adapter: ModelPath | None = None
    """Adapter file: this project's own, official v1, litgpt or PEFT; null runs the base without an adapter."""
    template: FileOrName | None = None
    """Template of the commands: `alpaca`; `chat`, the model's own; or a .json or .jinja file, as data.template of
    adapter-train; null for that of the adapter's training, or Alpaca's."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this."""
    seed: int = Field(default=0, ge=0)
    """Sampling seed."""
    batch_size: int = Field(default=64, ge=1)
    """Answers per batch; all commands about a class share its batches."""

    def open_template(self, tokenizer: Tokenizer) -> Template:
        """The template of the commands. Raises an error for an adapter or template that cannot be read."""
        from adapter.adapter_formats import read_adapter

        saved = read_adapter(cached_path(self.adapter)) if self.adapter is not None else None
        return saved_template(self.template, tokenizer, saved)

    def identity(self, *, weights: bool = True) -> dict[str, Any]:
        """Identify, by content, everything that the answers depend on.

        weights: False to leave the weights of a base on the hub there; the base is then not identified.

        Raises an error for a base, adapter or template that cannot be read.
        """
        checkpoint, tokenizer = self.base.open(weights=weights)
        pieces = open_tokenizer(tokenizer)
        return {
            "base": checkpoint.fingerprint() if checkpoint.has_weights else None,
            "tokenizer": pieces.fingerprint,
            "dtype": self.base.dtype,
            "adapter": file_fingerprint(cached_path(self.adapter)) if self.adapter is not None else None,
            "template": template_fields(self.open_template(pieces)),
            "top_p": self.top_p,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


@config
class SamplingConfig:
    """Sampling settings of an endpoint or a LLaMA."""

    temperature: float = Field(default=0.99, ge=0)
    """Sampling temperature; 0 is greedy. It is high so that ten answers to a command are ten descriptions."""
    max_tokens: int = Field(default=50, ge=1)
    """Maximum number of tokens of an answer; CLIP's window holds 77 of its own tokens."""
    system: str = Sampling.system
    """System message that an endpoint is sent before each command."""


@config
class DescriptionConfig:
    """The source of the class descriptions, and the commands that a language model is given."""

    source: Literal["file", "endpoint", "llama", "templates"]
    """Source of the descriptions: a JSON `file`, an OpenAI-compatible `endpoint`, a `llama` on this machine, or the
    data set's `templates` alone."""
    file: AnyPath | None = None
    """For source=file: JSON {class name: [description, …]}, which is checked and copied."""
    endpoint: EndpointConfig | None = None
    llama: LlamaDescriberConfig | None = None
    commands: list[str] = Field(default=list(COMMANDS), min_length=1)
    """Commands that an endpoint or a LLaMA is given about each class, with {} for the class name."""
    answers: int = Field(default=ANSWERS, ge=1)
    """Number of answers to each command."""
    sampling: SamplingConfig = SamplingConfig()

    def identity(self, *, weights: bool = True) -> dict[str, Any]:
        """Identify, by content, everything besides the classes that the descriptions depend on.

        weights: False to leave the weights of a LLaMA on the hub there; it is then not identified.

        Raises an error for a section that is missing, a command without {}, or a model that cannot be opened.
        """
        if self.source == "templates" or (self.source == "file" and self.file is not None):
            return {"source": self.source}
        if self.source == "endpoint" and self.endpoint is not None:
            self.endpoint.open()
            model = {**self.endpoint.identity(), "system": self.sampling.system}
        elif self.source == "llama" and self.llama is not None:
            model = self.llama.identity(weights=weights)
        else:
            needed = {"file": "file", "endpoint": "endpoint.model", "llama": "llama.base.path"}[self.source]
            raise ConfigError(f"source is {self.source}, so {needed} is required, but not given")
        check_templates(self.commands, "command")
        sampling = {"temperature": self.sampling.temperature, "max_tokens": self.sampling.max_tokens}
        commands = {"commands": self.commands, "answers": self.answers}
        return {"source": self.source, **commands, **sampling, **model}

    def language_model(self) -> LanguageModel:
        """The endpoint or the LLaMA, loaded."""
        if self.source == "endpoint":
            assert self.endpoint is not None
            temperature, max_tokens = self.sampling.temperature, self.sampling.max_tokens
            sampling = Sampling(temperature=temperature, max_tokens=max_tokens, system=self.sampling.system)
            return EndpointModel(self.endpoint.open(), sampling)
        assert self.llama is not None
        llama, sampling_config, commands = self.llama, self.sampling, self.commands
        return load_on_gpu(
            lambda device: LlamaModel(llama.base.load(llama.adapter, device), llama, sampling_config, commands)
        )


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """The descriptions that an earlier start of the run has written; empty if there are none."""
    return read_json(path, "remove it to ask again") if path.exists() else {}


def write_descriptions(settings: DescriptionConfig, classes: ClassNames, path: Path) -> dict[str, list[str]]:
    """Ask for the descriptions that the file lacks; write the file after every class.

    Raises StorageError for a file that cannot be written, and OSError for an endpoint that refuses.
    """
    names = list(dict.fromkeys(classes.names))
    model = settings.language_model()
    described = len(names) - len(classes.missing(read_descriptions(path)))
    with (
        endpoint_errors(settings.endpoint),
        SyncedFolder(path.parent) as folder,
        Progress("prompt", unit="classes", total=len(names), done=described) as bar,
    ):

        def report(name: str, descriptions: int) -> None:
            folder.send(now=True)
            bar.advance(note=f"{name}: {descriptions} descriptions")

        file = folder.fetch(path.name)
        return describe_classes(model, names, file, commands=settings.commands, answers=settings.answers, report=report)


class LlamaModel:
    """A `LanguageModel` on this machine. The first command about a class decodes the answers to all commands."""

    def __init__(
        self, model: AdaptedModel, settings: LlamaDescriberConfig, sampling: SamplingConfig, commands: Sequence[str]
    ) -> None:
        self._model, self._settings, self._sampling = model, settings, sampling
        self._commands, self._template = list(dict.fromkeys(commands)), settings.open_template(model.tokenizer)
        self._decoded: tuple[tuple[str, int] | None, dict[str, list[str]]] = (None, {})

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """`n` answers to the command as an instruction. They do not depend on earlier calls."""
        if self._decoded[0] != (class_name, n):
            self._decoded = ((class_name, n), self._decode(class_name, n))
        return self._decoded[1][command]

    def _decode(self, class_name: str, n: int) -> dict[str, list[str]]:
        commands = [command for command in self._commands for _ in range(n)]
        records = [{"instruction": command.format(with_spaces(class_name))} for command in commands]
        answers: dict[str, list[str]] = {command: [] for command in self._commands}
        size = self._settings.batch_size
        for start in range(0, len(records), size):
            texts = self._model.answer_records(
                records[start : start + size],
                template=self._template,
                max_new_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                top_p=self._settings.top_p,
                # equal prompts in one batch are sampled differently; equal prompts in two batches need two seeds
                seed=self._settings.seed * 1_000_003 + start,
            )
            for command, text in zip(commands[start : start + size], texts, strict=True):
                answers[command].append(text)
        return answers
