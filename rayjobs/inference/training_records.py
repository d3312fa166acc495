"""Recognise records that an adapter was trained on, by the run that left the adapter."""

from collections.abc import Iterable
from pathlib import Path

from rayjobs.config import load
from rayjobs.data.records import DataConfig, Source
from rayjobs.errors import UserError
from rayjobs.runs.run_dir import CONFIG_FILE
from rayjobs.storage.download import cached_path
from rayjobs.storage.hub import is_hub_path
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.yaml_file import read_yaml


def describe_overlap(adapter: str | None, sources: Iterable[Source]) -> str:
    """Name the sources that the adapter was trained on, by the content of their files; empty if none is known.

    It is known where the settings of the training run lie beside the adapter, and its files are still there. Records
    that a run held out of a file for validation count as trained on, since nothing tells them apart here.
    """
    trained_on: list[Source] = []
    if adapter is not None:  # the copy of one on the hub has the run's settings beside it
        trained_on = _training_sources(cached_path(adapter) if is_hub_path(adapter) else resolve_path(adapter))
    digests = {_content(source) for source in trained_on} - {None}
    known = [
        source.path + (f" ({source.split})" if source.split else "")
        for source in sources
        if digests and _content(source) in digests
    ]
    if not known:
        return ""
    return (
        f"the adapter was trained on {', '.join(known)}, by the settings beside it: the figures say how well it knows "
        "these records, not how well it does on others"
    )


def _content(source: Source) -> tuple[str, ...] | None:
    """The digests of a source's files, and its split; None if they are not there any more."""
    try:
        return (*source.digests(), source.split)
    except (OSError, UserError):
        return None


def _training_sources(adapter: Path) -> list[Source]:
    """The sources of the run that left an adapter in its folder; none if there is no run's config.yaml."""
    path = (adapter if adapter.is_dir() else adapter.parent) / CONFIG_FILE
    if not path.is_file():
        return []
    try:
        data = load(DataConfig, read_yaml(path)["data"])
        return data.sources()
    except (ValueError, KeyError, TypeError, OSError):  # settings of another program or version
        return []
