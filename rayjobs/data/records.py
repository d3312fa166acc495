"""The records that a job names: files in several formats, each with its images, template and weight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from adapter.errors import RecordError
from adapter.records import scienceqa
from adapter.records.reader import AUTO, read_records, recognise
from adapter.templates import Template, template_fields
from rayjobs.config import config
from rayjobs.data.record_files import RecordsPath, Role, find_files, is_folder, is_pattern, local_copy, short_name
from rayjobs.errors import ConfigError, DataError
from rayjobs.storage.fingerprint import file_fingerprint, file_fingerprints, fingerprint
from rayjobs.storage.hub import is_hub_path
from rayjobs.storage.paths import AnyPath, FileOrName, resolve_path

Format = Literal["auto", "alpaca", "messages", "sharegpt", "llava", "prompt_completion", "text", "scienceqa"]
Column = Literal[
    "instruction",
    "input",
    "output",
    "image",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "text",
    "system",
    "tools",
]
"""Columns of records that may have other names in a file."""


@config
class SourceConfig:
    """One of several sources of records, with settings of its own."""

    path: RecordsPath
    """File, pattern, folder, URL or hub id, as in `data.path`."""
    format: Format | None = None
    """Format of the records; null for the format of all sources."""
    columns: dict[Column, str] | None = None
    """{column: its name in the files}; null for those of all sources."""
    split: str | None = None
    """Split of a folder or of ScienceQA; null for `train` of a source of `data.path`, and `val` of one of
    `data.val_path`; ScienceQA is measured on `test`."""
    images: AnyPath | None = None
    """Folder that the image paths of the records are relative to; null for the folder of the records."""
    weight: float = Field(default=1, gt=0)
    """Times that each record is trained on in an epoch: 2 for twice, 0.5 for every second epoch."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of records, with everything that is needed to read it."""

    path: str
    format: Format
    split: str
    """split of a folder or of ScienceQA; empty for the one of the role"""
    role: Role
    images: str
    """folder that image paths are relative to"""
    weight: float
    template: str | None
    """name or file of a template; None for the one that suits the records (`rayjobs.data.templates`)"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """{column: its name in the files}, where it has another"""

    @cached_property
    def files(self) -> list[str]:
        """The files that the records are read from: local paths, URLs and hf:// paths.

        They are found on first use, and a copy of the source that is sent to a worker names the same.

        Raises:
            DataError, StorageError: there are none.
        """
        if self.format == "scienceqa":
            return [str(resolve_path(self.path) / name) for name in (scienceqa.PROBLEMS, scienceqa.SPLITS)]
        return find_files(self.path, self.split, self.role)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records in order, in the shapes of `adapter.records.reader`.

        In place of a record that cannot be used stands its place in the file, under the key `place`, and the reason,
        under the key `rejected`. Records of several files all have their place, which begins with the file.

        Raises:
            RecordError: a file as a whole cannot be read.
            DataError, StorageError: there are no files.
        """
        if self.format == "scienceqa":
            yield from scienceqa.read_problem_records(resolve_path(self.path), self.split)
            return
        for name, file in zip(self.file_names, self.files, strict=True):
            for number, record in enumerate(self._read_file(file), 1):
                if name:
                    record["place"] = f"{name}, {record.get('place', f'record {number}')}"
                yield record

    def _read_file(self, file: str) -> Iterator[dict[str, Any]]:
        with self._local_copy(file) as copy:
            yield from read_records(copy, format=self.format, columns=self.columns, keep_rejected=True)

    @staticmethod
    @contextmanager
    def _local_copy(file: str) -> Iterator[Path]:
        """A file on this machine; errors about it name the file and not the copy."""
        copy = local_copy(file)
        try:
            yield copy
        except RecordError as error:
            raise RecordError(str(error).replace(str(copy), file)) from error

    def describe(self) -> str:
        """Describe what is read, in a line: the path, the split, the number of files and the formats of the records.

        Raises:
            RecordError: a file that cannot be read, as far as its first records show it.
        """
        formats: dict[str, None] = {}
        if self.format == AUTO:
            for file in self.files:
                with self._local_copy(file) as copy:
                    formats |= dict.fromkeys(recognise(copy, self.columns))
        elif self.format == "scienceqa":
            next(self.read(), None)
        else:
            for file in self.files:
                next(self._read_file(file), None)
        unknown = "no usable record" if self.format == AUTO else self.format
        files = f", {len(self.files):,} files" if len(self.files) > 1 and self.format != "scienceqa" else ""
        return f"{self.path}{f' {self.split}' if self.split else ''}{files}: {' and '.join(formats) or unknown}"

    @property
    def file_names(self) -> list[str]:
        """The names of the files as messages show them: one alone has no name, others theirs below the folder."""
        return [short_name(self.path, file) for file in self.files] if len(self.files) > 1 else [""]

    def image_paths(self) -> list[str]:
        """Return the image paths of the records, each once, in the order of the records."""
        return list(dict.fromkeys(record["image"] for record in self.read() if record["image"]))

    def identity(self, template: Template, *, with_images: bool) -> dict[str, Any]:
        """Identify, by content, what training on these records in a template depends on.

        with_images: False if their images are left out.
        """
        images = file_fingerprints(self.images, self.image_paths()) if with_images else {}
        return {
            "records": fingerprint(self.digests())[:16],
            "images": fingerprint(images)[:16] if with_images else "left out",
            "format": self.format,
            "columns": dict(self.columns),
            "split": self.split,
            "template": fingerprint(template_fields(template))[:16],
            "weight": self.weight,
        }

    def digests(self) -> list[str]:
        """Return the SHA-256 of each file."""
        return [file_fingerprint(local_copy(file)) for file in self.files]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping | SourceConfig) else value


Sources = Annotated[list[RecordsPath | SourceConfig], BeforeValidator(_as_list)]
"""Sources of records; a single one may stand without its list."""


@config
class RecordsConfig:
    """Records, and how they become tokens."""

    path: Sources
    """Sources of records: files (.json, .jsonl, .csv, .tsv, also as .gz or .zst; .parquet, .arrow), patterns such as
    `data/*.jsonl`, folders, folders saved by `datasets`, ids of data sets on the Hugging Face hub, and ScienceQA's
    folder. A source with settings of its own is written {path: …, format: …, columns: …, split: …, images: …, weight:
    …}, where images is the folder that its image paths are relative to and weight is the number of times that each
    record is trained on in an epoch."""
    format: Format = "auto"
    """Format of the records: auto, each record's own by its columns; alpaca {instruction, input?, output, image?};
    messages {messages}; sharegpt or llava {conversations, image?}; prompt_completion {prompt, completion}; text {text};
    scienceqa, its original folder."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """{column: its name in the files}, for columns that have other names there: {instruction: question}."""
    template: FileOrName | None = None
    """Template: `chat`, the model's own chat template; `alpaca`; `scienceqa`; `plain` for none; a .jinja file with a
    chat template, or a JSON file with `with_input`, `without_input` and, for conversations, `later`. null chooses by
    the records: Alpaca's for instructions and LLaVA's conversations, ScienceQA's for its problems, for other
    conversations the model's own or else Alpaca's, and none for texts and for prompts with completions."""
    max_length: int = Field(default=512, ge=2)
    """Longest sequence in tokens. Longer conversations lose their oldest turns whole, other records the beginning of
    their input; then the last answer loses its end. Longer texts become several sequences."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of the records cannot be used. Up to it, they are left out and listed, each with
    its file, number and reason, in rejected.jsonl."""

    def sources(self) -> list[Source]:
        """Return the sources that `path` names, in order."""
        return [self.source(given, "train") for given in self.path]

    def val_sources(self) -> list[Source]:
        """Return the sources of validation records; none here."""
        return []

    def all_sources(self) -> list[Source]:
        """Return the sources of training records, then those of validation records."""
        return [*self.sources(), *self.val_sources()]

    @property
    def held_out_fraction(self) -> float:
        """The share of the records of `path` that is held out for validation; none here."""
        return 0.0

    def source(self, given: str | SourceConfig, role: Role) -> Source:
        """Return a source with the defaults of this section filled in.

        role: what it is for, which chooses its split if it names none.
        """
        source = SourceConfig(path=given) if isinstance(given, str) else given
        format = source.format or self.format
        columns = self.columns if source.columns is None else source.columns
        if format == AUTO and _is_scienceqa(source.path):
            format = "scienceqa"
        return Source(
            path=source.path if is_hub_path(source.path) else str(resolve_path(source.path)),
            format=format,
            split=(source.split or role) if format == "scienceqa" else source.split or "",
            role=role,
            images=str(resolve_path(source.images)) if source.images else _image_folder(source.path),
            weight=source.weight,
            template=self.template,
            columns={str(column): name for column, name in columns.items()},
        )


def set_names(sources: Sequence[Source]) -> list[str]:
    """Return a short name for each source, by which curves and tables tell the sets of a mixture apart.

    It is the end of the path, as much of it as tells the sources apart, and the split; with a number where that does
    not.
    """
    parts = [source.path.rstrip("/").split("/") for source in sources]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = [
            " ".join(filter(None, ("/".join(part[-depth:]), source.split)))
            for part, source in zip(parts, sources, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def check_sources(sources: Sequence[Source]) -> None:
    """Read the first record of each source.

    Raises:
        ConfigError: no source is named.
        DataError: a source has no record, or its first one cannot be read.
    """
    if not sources:
        raise ConfigError("data.path is empty: name at least one file of records")
    for source in sources:
        if next(iter(source.read()), None) is None:
            raise DataError(f"{source.path}: no records")


def _is_scienceqa(path: str) -> bool:
    """Return whether a path is the folder of ScienceQA's authors."""
    return is_folder(path) and not is_hub_path(path) and (resolve_path(path) / scienceqa.PROBLEMS).is_file()


def _image_folder(path: str) -> str:
    """The folder of the records: that of a file, the part of a pattern that is no pattern, or the folder itself."""
    folder: Any = path if is_hub_path(path) else str(resolve_path(path))
    if is_pattern(path):
        while is_pattern(folder):
            folder = folder.rpartition("/")[0]
        return folder
    return folder if is_folder(path) else folder.rpartition("/")[0]


@config
class DataConfig(RecordsConfig):
    """Instruction records to train on, and to validate on."""

    val_path: Sources = Field(default_factory=list)
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
