"""Local paths, and URLs such as s3://bucket/runs, which fsspec opens.

Object stores cannot append, rename or memory-map. So a file is written there in one request (`rayjobs.storage.files`),
a file that grows is written locally and uploaded whole (`rayjobs.storage.sync`), and a file that must be local is
copied first (`rayjobs.storage.download`).
"""

import difflib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from cafo.items import leads_out
from rayjobs.errors import ConfigError, DataError, StorageError
from rayjobs.storage.credentials import drop_mask
from rayjobs.storage.hub import HUB, HubPath, is_hub_id, is_hub_path, pin


def resolve_path(path: str | Path) -> Path:
    """An absolute local path, or for a URL an object with a path's methods (a UPath, by type no Path).

    Sends no request. Raises StorageError for a URL whose protocol fsspec does not know, with the closest that it knows,
    or cannot load, with fsspec's own advice on what to install.
    """
    if not is_url(path):
        return Path(path).absolute()
    import fsspec
    from upath import UPath

    path = drop_mask(str(path))
    protocol = path.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        close = difflib.get_close_matches(protocol, fsspec.available_protocols(), n=1)
        hint = f"did you mean {close[0]}://?" if close else "write a local path, or a URL such as s3://bucket/folder"
        raise StorageError(f"{path}: {error}; {hint}") from error
    except ImportError as error:
        raise StorageError(f"{path}: {error}") from error
    # Other processes write there too, so a listing of a minute ago must not stand for the present one.
    resolved: Any = UPath(path, use_listings_cache=False)
    return resolved


def check_reachable(path: str | Path) -> None:
    """Send one request to a URL, so that a wrong name or missing credentials end a command before its work starts.

    A URL that names nothing yet passes, as does a local path; on the hub, what is read must be there. Raises
    StorageError.
    """
    if is_hub_path(path):
        pin(str(path))
    elif is_url(path):
        remote: Any = resolve_path(path)
        # HTTP's backend otherwise takes a server that refuses or fails for one that lacks the file.
        how = {"strict": True} if remote.protocol in ("http", "https") else {}
        with as_storage_error(path, "reached"):
            remote.fs.exists(remote.path, **how)


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file. One request gets that of a URL: another process may replace the file meanwhile.

    Raises FileNotFoundError, or whatever the backend raises.
    """
    found: Any = resolve_path(path)
    return found.fs.cat_file(found.path) if is_url(path) else found.read_bytes()


def upload_file(file: Path, url: Path) -> None:
    """Upload a local file in one request: the URL then holds the whole file or its old content. Raises StorageError."""
    remote: Any = url
    with as_storage_error(url, "written"):
        remote.fs.put_file(str(file), remote.path)


def make_folder(folder: Path) -> None:
    """Make a local folder, and those above it, unless it is there. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"the folder {folder} cannot be made: {reason}; name one where you may write") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder, local or at a URL, with all that is in it."""
    if is_url(folder):
        remote: Any = folder
        remote.fs.rm(remote.path, recursive=True)
    else:
        shutil.rmtree(folder)


def inside(folder: Path, name: str) -> Path:
    """Return the file of this name in a folder or below it. Raises DataError for a name that leads out of it."""
    if not name or leads_out(name):
        raise DataError(f"{folder}: the name {name!r} leads out of this folder, so its file is not opened")
    return folder / name


@contextmanager
def as_storage_error(path: str | Path, action: str) -> Iterator[None]:
    """Turn an error of any backend, each of which has its own classes, into a StorageError that names the URL."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{path} cannot be {action}: {reason}") from error


MODEL_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".json")
"""Endings that a file has and the name of a repository hardly ever."""


@dataclass(frozen=True)
class ShownAs:
    """The name that help texts give to an annotated type."""

    name: str


def _refuse_url(path: str) -> str:
    if is_url(path):
        raise ConfigError("must be a local path, not a URL: mount the bucket, or copy it to where all nodes see it")
    return path


def _absolute(path: str) -> str:
    home = path.startswith("~/")  # which a shell leaves as it is after an equals sign
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path) if home else path)


def _local_or_on_hub(text: str) -> str:
    """Read text of two names as a hub id, unless it exists here or is spelled like a local path."""
    if is_hub_path(text):
        return str(HubPath.parse(text))
    looks_local = os.path.exists(text) or os.path.splitext(text)[1] in MODEL_SUFFIXES
    return _absolute(text) if looks_local or not is_hub_id(text) else f"{HUB}{text}"


def _absolute_file(text: str) -> str:
    return os.path.abspath(text) if os.path.isfile(text) else text


AnyPath = Annotated[str, AfterValidator(_absolute), ShownAs("path")]
"""A path or URL in a config. A relative path starts in the folder where the command is typed, since workers, which open
it too, run elsewhere."""

LocalPath = Annotated[str, AfterValidator(_refuse_url), AfterValidator(_absolute), ShownAs("local path")]
"""A path in a config that a library reads which knows no URLs; a relative one starts where the command is typed."""

ModelPath = Annotated[str, AfterValidator(_local_or_on_hub), ShownAs("path or hub id")]
"""A model in a config: a path or URL, or if nothing of that name is there, an id on the Hugging Face hub, `org/name` or
`org/name@revision`, held as `hf://org/name`. A path with ./ before it is never looked for on the hub."""

FileOrName = Annotated[str, AfterValidator(_absolute_file), ShownAs("file or name")]
"""Text in a config that is a file, local or at a URL, if there is one of that name, and a name otherwise."""
