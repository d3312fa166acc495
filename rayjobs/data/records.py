"""The records that a job names: files in several formats, each with its images, its template and its weight."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from pydantic import Field
from adapter import scienceqa
from adapter.conversation import read_conversations
from adapter.instruct import ALPACA, PromptTemplate, read_records
from rayjobs.config import config
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import AnyPath, FileOrName, resolve_path
from rayjobs.storage.fingerprint import file_fingerprint


Format = Literal["alpaca", "scienceqa", "llava"]
TEMPLATES = {"alpaca": ALPACA, "llava": ALPACA, "scienceqa": scienceqa.TEMPLATE}


@config
class SourceConfig:
    """One file of records among others."""

    path: AnyPath
    """The file or ScienceQA's folder; either may be a URL."""
    format: Format | None = None
    """Its format; null for that of all."""
    split: str | None = None
    """ScienceQA's split; null for train, and for val where it validates."""
    images: AnyPath | None = None
    """The folder that its images' paths start from; null for its own."""
    weight: float = Field(default=1, gt=0)
    """How often each record is trained on in an epoch: 2 for twice, 0.5 for every second epoch."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of records, and all that reading it needs."""

    path: str
    format: Format
    split: str
    images: str
    weight: float
    template: PromptTemplate

    def read(self) -> Iterator[dict[str, str]]:
        """Its records {instruction, input, output, image}, in order; an odd conversation is one that is `rejected`.

        Raises RecordError naming what is malformed.
        """
        if self.format == "scienceqa":
            return (problem.record() for problem in scienceqa.read_problems(resolve_path(self.path), self.split))
        path = cached_path(self.path)
        return read_conversations(path) if self.format == "llava" else read_records(path)

    def image_paths(self) -> list[str]:
        """Its images below `images`, each once, in the order in which its records name them."""
        return list(dict.fromkeys(record["image"] for record in self.read() if record["image"]))

    @property
    def files(self) -> list[Path]:
        """What its records depend on besides the split."""
        names = ("problems.json", "pid_splits.json")
        return (
            [resolve_path(self.path) / name for name in names]
            if self.format == "scienceqa"
            else [resolve_path(self.path)]
        )

    def digests(self) -> list[str]:
        """SHA-256 of its files."""
        return [file_fingerprint(cached_path(file)) for file in self.files]


@config
class RecordsConfig:
    """Instruction records and how they become tokens."""

    path: list[AnyPath | SourceConfig]
    """Files of records: .json (an array), .jsonl or .parquet, or ScienceQA's folder. A file with settings of its own is
    written {path: …, format: …, split: …, images: …, weight: …}; images is the folder that its images' paths start
    from, weight how often each record is trained on in an epoch."""
    format: Format = "alpaca"
    """alpaca {instruction, input?, output, image?}; scienceqa, its original folder; llava {image?, conversations}."""
    template: FileOrName | None = None
    """Prompt template: 'alpaca', 'scienceqa', or a JSON file with 'with_input' and 'without_input'; null for the
    format's own."""
    max_length: int = Field(default=512, ge=2)
    """The longest sequence in tokens; longer records lose the left of their input, then the right of their output."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of the records cannot be used."""

    def sources(self) -> list[Source]:
        """What `path` names, in order. Raises ValueError for a template that cannot be read."""
        return [self.source(one, "train") for one in self.path]

    def source(self, given: str | SourceConfig, split: str) -> Source:
        one = SourceConfig(path=given) if isinstance(given, str) else given
        kind = one.format or self.format
        path = resolve_path(one.path)
        folder = path if kind == "scienceqa" else path.parent
        return Source(
            path=str(path),
            format=kind,
            split=(one.split or split) if kind == "scienceqa" else "",
            images=str(resolve_path(one.images or folder)),
            weight=one.weight,
            template=prompt_template(self.template, kind),
        )


@config
class DataConfig(RecordsConfig):
    """Instruction records to train on, and to validate on."""

    val_path: list[AnyPath | SourceConfig] = Field(default_factory=list)
    """Held-out files; if none, a share of `path` is held out by a hash of each record's image, conversation or
    content."""
    val_fraction: float = Field(default=0.02, ge=0, lt=1)
    """The share of `path` held out for validation when `val_path` is empty; never trained on."""

    def val_sources(self) -> list[Source]:
        return [self.source(one, "val") for one in self.val_path]


def prompt_template(name: str | None, kind: Format = "alpaca") -> PromptTemplate:
    """A template by name or file; null is the format's own. Raises ValueError for a file that is none."""
    known = TEMPLATES.get(name or kind)
    return known or PromptTemplate.read(cached_path(str(name)))
