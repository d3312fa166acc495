"""Find the files of a source of records: one file, a pattern, a folder, or a data set on the Hugging Face hub.

Files are named by local paths, URLs or hf:// paths. They are found once, where a job begins, and its workers read the
same. Their order is that of their names.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from adapter.records.files import EXPECTED, is_record_file
from rayjobs.data.data_set_splits import choose_split, matching
from rayjobs.errors import ConfigError, DataError
from rayjobs.storage.download import cached_path
from rayjobs.storage.hub import HUB, HubPath, hub_copy, hub_errors, is_hub_id, is_hub_path, pin
from rayjobs.storage.paths import ShownAs, is_url, resolve_path

logger = logging.getLogger(__name__)

Role = Literal["train", "val", "test"]
"""Use of records, which chooses a split where none is named."""

_DATA_SETS = f"{HUB}datasets/"
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})(\..*)?")
"""A file that is one of a number of parts, as `datasets` names them."""


def _local_or_on_hub(text: str) -> str:
    """Take for a local path what is, or would be, in a folder that exists here, or is spelled like a path."""
    if is_hub_path(text):
        if not text.startswith(_DATA_SETS):
            raise ConfigError(f"{text} names a model on the hub; a data set is {_DATA_SETS}org/name")
        return str(HubPath.parse(text))
    if is_url(text):
        return text
    local = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(os.path.dirname(local)) or is_record_file(text) or not is_hub_id(text):
        return local
    return f"{_DATA_SETS}{text}"


RecordsPath = Annotated[str, AfterValidator(_local_or_on_hub), ShownAs("path or hub id")]
"""Records in a config: a path, a pattern of paths or a URL; or if there is no such folder here, the id of a data set on
the Hugging Face hub, `org/name` or `org/name@revision`, held as `hf://datasets/org/name`. A path with ./ before it is
never looked for on the hub."""


def is_folder(path: str) -> bool:
    """Return whether a source is neither a file of records by its name nor a pattern: a folder, or a data set."""
    return not is_record_file(path) and not is_pattern(path)


def find_files(path: str, split: str, role: Role) -> list[str]:
    """The files of records that a source names, in order; of a folder with splits those of one split.

    split: name of the split; empty for the one of the role.

    Raises DataError for a path that names no records, and for a folder without the split.
    """
    path = pin(path)
    if is_folder(path) and not os.path.isfile(path):
        names = _list_folder(path)
        chosen = choose_split(path, names, split, role, lambda name: local_copy(_join(path, name)))
        files = [_join(path, name) for name in chosen]
        _check_shards(files)
    elif split:
        raise DataError(f"{path}: split={split!r} is given, but only a folder has splits; name the split's own files")
    else:
        files = _match(path) if is_pattern(path) else [path]
    if not files:
        raise DataError(f"{path}: no file of records; expected {EXPECTED}")
    return files


def local_copy(file: str) -> Path:
    """A file on this machine: itself, or a copy of what a URL names. Raises StorageError or FileNotFoundError."""
    return hub_copy(HubPath.parse(file)) if is_hub_path(file) else cached_path(file)


def short_name(path: str, file: str) -> str:
    """The name of a source's file for messages: below the source's folder, or its last part."""
    folder = path.rstrip("/") + "/"
    return file.removeprefix(folder) if file.startswith(folder) else PurePosixPath(file).name


def is_pattern(path: str) -> bool:
    """Return whether a path holds symbols of a pattern, and no file of that name is there."""
    if not is_url(path) and os.path.exists(path):
        return False
    return any(symbol in path for symbol in ("*[" if is_url(path) else "*[?"))  # a URL has its query after "?"


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _list_folder(path: str) -> list[str]:
    """The names of all files in a folder and its folders, in order, without hidden ones."""
    if is_hub_path(path):
        hub = HubPath.parse(path)
        prefix = f"{hub.file}/" if hub.file else ""
        names = [name.removeprefix(prefix) for name in _list_repository(hub) if name.startswith(prefix)]
    elif is_url(path):
        remote: Any = resolve_path(path)
        prefix = remote.path.rstrip("/") + "/"
        names = [name.removeprefix(prefix) for name in remote.fs.find(remote.path) if name.startswith(prefix)]
    else:
        if not os.path.isdir(path):
            raise DataError(f"{path}: no such file or folder; expected {EXPECTED}, a folder of these, or a hub id")
        found = (os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files)
        names = [os.path.relpath(name, path).replace(os.sep, "/") for name in found]
    return sorted(name for name in names if not any(part.startswith((".", "__")) for part in name.split("/")))


def _list_repository(hub: HubPath) -> list[str]:
    """All files of a data set on the hub; those in its cache if the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repo: dict[str, Any] = {"repo_id": hub.repo_id, "repo_type": hub.repo_type, "revision": hub.revision}
    with hub_errors(hub):
        try:
            return list(HfApi().list_repo_files(**repo))
        except Exception as error:  # each release has another library for HTTP, with errors of its own
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            try:
                folder = Path(snapshot_download(**repo, allow_patterns=[], local_files_only=True))
            except FileNotFoundError:
                raise error from None
            logger.warning("%s: the hub cannot be reached; the files are those that its cache holds", hub)
            return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _match(path: str) -> list[str]:
    """The files that a pattern matches, in order."""
    if is_hub_path(path):
        hub = HubPath.parse(path)
        root = str(HubPath(hub.repo_id, hub.repo_type, hub.revision))
        return [f"{root}/{name}" for name in matching(hub.file, sorted(_list_repository(hub)))]
    if is_url(path):
        remote: Any = resolve_path(path)
        found = remote.fs.glob(remote.path, detail=True)
        return [remote.fs.unstrip_protocol(name) for name in sorted(found) if found[name]["type"] == "file"]
    return sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))


def _check_shards(files: Sequence[str]) -> None:
    """Raise DataError if the names of files say how many parts there are, and some are not there."""
    parts = Counter(match.groups("") for match in map(_SHARD.fullmatch, files) if match)
    for (name, count, ending), found in parts.items():
        if found < int(count):
            raise DataError(f"{name}…-of-{count}{ending}: {found} of {int(count)} parts are there; fetch the others")
