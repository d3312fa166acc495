"""The instruction records that a job names: files in several formats, each with its images, template and weight."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from adapter.errors import RecordError
from adapter.records import scienceqa
from adapter.records.conversation import read_conversations
from adapter.records.instruct import read_records
from adapter.templates import ALPACA, PromptTemplate
from rayjobs.config import config
from rayjobs.storage.download import cached_path
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.storage.paths import AnyPath, FileOrName, resolve_path

Format = Literal["alpaca", "scienceqa", "llava"]
TEMPLATES = {"alpaca": ALPACA, "llava": ALPACA, "scienceqa": scienceqa.TEMPLATE}


@config
class SourceConfig:
    """One of several sources of records, with settings of its own."""

    path: AnyPath
    """File of records, or ScienceQA's folder. It may be a URL."""
    format: Format | None = None
    """Format of the records; null for the format of all sources."""
    split: str | None = None
    """Split of ScienceQA; null for `train` in training data and `val` in validation data."""
    images: AnyPath | None = None
    """Folder that the image paths of the records are relative to; null for the folder of the file."""
    weight: float = Field(default=1, gt=0)
    """Times that each record is trained on in an epoch: 2 for twice, 0.5 for every second epoch."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of records, with everything that is needed to read it."""

    path: str
    format: Format
    split: str
    """split of ScienceQA; empty for other formats"""
    images: str
    """folder that image paths are relative to"""
    weight: float
    template: PromptTemplate

    def read(self) -> Iterator[dict[str, str]]:
        """Yield the records {instruction, input, output, image} in order.

        In place of a record that cannot be used stands an empty one, with its place in the file in the key `place` and
        the reason in the key `rejected`.

        Raises:
            RecordError: the file as a whole cannot be read.
        """
        if self.format == "scienceqa":
            yield from scienceqa.read_problem_records(resolve_path(self.path), self.split)
            return
        copy = str(cached_path(self.path))
        try:
            yield from read_conversations(copy) if self.format == "llava" else read_records(copy, keep_rejected=True)
        except RecordError as error:
            raise RecordError(str(error).replace(copy, self.path)) from error  # the URL, not the copy of it

    def image_paths(self) -> list[str]:
        """Return the image paths of the records, each once, in the order of the records."""
        return list(dict.fromkeys(record["image"] for record in self.read() if record["image"]))

    @property
    def files(self) -> list[Path]:
        """The files that the records are read from."""
        path = resolve_path(self.path)
        return [path / name for name in ("problems.json", "pid_splits.json")] if self.format == "scienceqa" else [path]

    def digests(self) -> list[str]:
        """Return the SHA-256 of each file."""
        return [file_fingerprint(cached_path(file)) for file in self.files]


@config
class RecordsConfig:
    """Instruction records, and how they become tokens."""

    path: list[AnyPath | SourceConfig]
    """Sources of records: .json (an array), .jsonl or .parquet files, or ScienceQA's folder. A source with settings of
    its own is written {path: …, format: …, split: …, images: …, weight: …}, where images is the folder that its image
    paths are relative to and weight is the number of times that each record is trained on in an epoch."""
    format: Format = "alpaca"
    """Format of the records: alpaca {instruction, input?, output, image?}; scienceqa, its original folder; llava
    {image?, conversations}."""
    template: FileOrName | None = None
    """Prompt template: `alpaca`, `scienceqa`, or a JSON file with `with_input` and `without_input`; null for the
    format's own."""
    max_length: int = Field(default=512, ge=2)
    """Longest sequence in tokens. Longer records lose the beginning of their input, then the end of their output."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of the records cannot be used. Up to it, they are left out and listed, each with
    its file, number and reason, in rejected.jsonl."""

    def sources(self) -> list[Source]:
        """Return the sources that `path` names, in order.

        Raises:
            RecordError: a template that cannot be read.
        """
        return [self.source(given, "train") for given in self.path]

    def val_sources(self) -> list[Source]:
        """Return the sources of validation records; none here."""
        return []

    @property
    def held_out_fraction(self) -> float:
        """The share of the records of `path` that is held out for validation; none here."""
        return 0.0

    def source(self, given: str | SourceConfig, split: str) -> Source:
        """Return a source with the defaults of this section filled in.

        split: ScienceQA's split for a source that names none.
        """
        source = SourceConfig(path=given) if isinstance(given, str) else given
        format = source.format or self.format
        path = resolve_path(source.path)
        return Source(
            path=str(path),
            format=format,
            split=(source.split or split) if format == "scienceqa" else "",
            images=str(resolve_path(source.images or (path if format == "scienceqa" else path.parent))),
            weight=source.weight,
            template=prompt_template(self.template, format),
        )


@config
class DataConfig(RecordsConfig):
    """Instruction records to train on, and to validate on."""

    val_path: list[AnyPath | SourceConfig] = Field(default_factory=list)
    """Sources of validation records. If there are none, a share of `path` is held out by a hash of each record's image,
    conversation or content."""
    val_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the records of `path` that is held out for validation if `val_path` is empty; it is never trained on."""

    def val_sources(self) -> list[Source]:
        """Return the sources that `val_path` names, in order."""
        return [self.source(given, "val") for given in self.val_path]

    @property
    def held_out_fraction(self) -> float:
        """The share of the records of `path` that is held out for validation; 0 if `val_path` names others."""
        return 0.0 if self.val_path else self.val_fraction


def prompt_template(name: str | None, format: Format = "alpaca") -> PromptTemplate:
    """Return a prompt template by its name or file; None for the format's own.

    Raises:
        RecordError: the file is not a template.
    """
    known = TEMPLATES.get(name or format)
    return known or PromptTemplate.read(cached_path(str(name)))
