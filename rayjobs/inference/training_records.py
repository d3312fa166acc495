"""Recognise records that an adapter was trained on, by the run that left the adapter."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rayjobs.config import load
from rayjobs.data.records import DataConfig
from rayjobs.data.trained_records import read_digests, record_digest, trained_digests
from rayjobs.errors import ConfigError, DataError, UserError
from rayjobs.runs.run_dir import CONFIG_FILE
from rayjobs.storage.download import cached_path
from rayjobs.storage.hub import is_hub_path
from rayjobs.storage.hub_model import TRAINED_RECORDS_FILE
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.yaml_file import read_yaml


class Overlap(NamedTuple):
    """The records to be scored, and those among them that an adapter was trained on, counted."""

    records: int
    trained_on: int | None
    """None if it is not known what the adapter was trained on."""
    example: str
    """the first of them, shortened"""

    @property
    def label(self) -> str:
        """The end of a result's headline that says so; empty if the adapter was trained on none of them."""
        if not self.trained_on:
            return ""
        if self.trained_on == self.records:
            return ", on records that the adapter was trained on"
        return f", {self.trained_on:,} of {self.records:,} records trained on"


def find_overlap(adapter: str | None, records: Iterable[dict[str, Any]]) -> Overlap:
    """Count the records whose content the adapter was trained on; those without usable content are not counted."""
    trained_on = set() if adapter is None else _trained_digests(adapter)
    total, found, example = 0, 0, ""
    for record in records:
        if "rejected" in record:
            continue
        total += 1
        if trained_on and record_digest(record) in trained_on:
            found += 1
            example = example or _shorten(record)
    return Overlap(total, None if trained_on is None else found, example)


def run_data(adapter: str) -> DataConfig:
    """The records of the run that left an adapter, with its settings for them.

    Raises ConfigError if no settings of a run are beside the adapter.
    """
    path = _run_folder(adapter) / CONFIG_FILE
    way_out = "name the records to score in data.path"
    if is_hub_path(adapter):
        raise ConfigError(f"split=val needs the files of the run, and {adapter} is a copy on the hub: {way_out}")
    if not path.is_file():
        raise ConfigError(f"split=val needs the run that trained the adapter, but there is no {path}: {way_out}")
    try:
        return load(DataConfig, read_yaml(path)["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not the settings of a run of adapter-train ({error}): {way_out}") from error


def _run_folder(adapter: str) -> Path:
    """The folder of an adapter's file; of one on the hub that of its copy."""
    path = cached_path(adapter) if is_hub_path(adapter) else resolve_path(adapter)
    return path if path.is_dir() else path.parent


def _trained_digests(adapter: str) -> set[int] | None:
    """The digests that the run left, or those of the records that its settings name; None if neither is there."""
    path = _run_folder(adapter) / TRAINED_RECORDS_FILE
    if path.is_file():
        try:
            return read_digests(path)
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: a damaged list of the records that were trained on ({error})") from error
    try:
        return trained_digests(run_data(adapter))
    except (OSError, UserError, ValueError):  # an adapter of another program, or its records are not there any more
        return None


def _shorten(record: dict[str, Any]) -> str:
    texts = (record.get(key) for key in ("instruction", "prompt", "text", "messages"))
    return f"{next(filter(None, texts), '')!s:.60}"
