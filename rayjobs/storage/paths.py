"""Where files lie: local paths, and URLs such as s3://bucket/runs, which fsspec opens.

Object stores know no append, no rename and no mmap. So whole files are put there at once (`rayjobs.storage.files`),
what grows line by line grows locally and is sent in whole (`rayjobs.storage.sync`), and what must be mapped is copied
here first (`local_copy`).
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from rayjobs.errors import UserError

BACKENDS = {"s3": "s3fs", "gs": "gcsfs"}
_REACHED: set[str] = set()


def resolve_path(path: str | Path) -> Path:
    """An absolute local path, or for a URL an object with a path's methods (a UPath, by type no Path).

    Raises ValueError for a URL of another kind, OSError if what it names cannot be reached.
    """
    if not is_url(path):
        return Path(path).absolute()
    protocol, _, rest = str(path).partition("://")
    if protocol not in BACKENDS:
        raise UserError(f"{path}: URLs may begin with {' or '.join(f'{name}://' for name in BACKENDS)}")
    if importlib.util.find_spec(BACKENDS[protocol]) is None:
        raise UserError(f"{path} needs the optional `{protocol}` extra, which is not installed")
    from upath import UPath

    # other processes write there too, so what was listed before is not what is there now
    found: Any = UPath(str(path), use_listings_cache=False)
    bucket = f"{protocol}://{rest.partition('/')[0]}"
    if bucket not in _REACHED:  # asked once, so that what is wrong is told in one line
        with _told(path, "reached"):
            found.exists()
        _REACHED.add(bucket)
    return found


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def cached_path(path: str | Path) -> Path:
    """A local path as it is; of a URL's file or folder a copy on this machine, made once for each content of it.

    Copies are kept in `$XDG_CACHE_HOME/rayjobs`, by default `~/.cache/rayjobs`. Raises FileNotFoundError.
    """
    if not is_url(path):
        return Path(path)
    from filelock import FileLock

    there: Any = resolve_path(path)
    files = there.fs.find(there.path)
    if not files:
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    content = [[file.removeprefix(there.path), there.fs.ukey(file)] for file in sorted(files)]
    digest = hashlib.sha256(repr([str(path), content]).encode()).hexdigest()[:20]
    copies = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rayjobs" / digest
    copy = copies / there.name
    if not copy.exists():
        copies.mkdir(parents=True, exist_ok=True)
        with FileLock(copies / "lock"):  # the processes of one machine wait for one copy
            if not copy.exists():
                unfinished = copies / "unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                there.fs.get(there.path, str(unfinished / there.name), recursive=files != [there.path])
                os.replace(unfinished / there.name, copy)
    return copy


def upload_file(file: Path, to: Path) -> None:
    """Puts a local file where a URL says, whole or not at all."""
    there: Any = to
    with _told(to, "written"):
        there.fs.put_file(str(file), there.path)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it."""
    if is_url(folder):
        there: Any = folder
        there.fs.rm(there.path, recursive=True)
    else:
        shutil.rmtree(folder)


@contextmanager
def _told(path: str | Path, what: str) -> Iterator[None]:
    """Turns the errors of any backend, each of which has its own, into an OSError that names the URL."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path} cannot be {what}: {told}") from error


def _refuse_url(path: str) -> str:
    if is_url(path):
        raise UserError("must be a local path, not a URL: mount the bucket, or copy it to where all nodes see it")
    return path


def _from_here(path: str) -> str:
    return str(path) if is_url(path) else os.path.abspath(path)


def _file_from_here(text: str) -> str:
    return os.path.abspath(text) if os.path.isfile(text) else text


AnyPath = Annotated[str, AfterValidator(_from_here)]
"""In a config: a path or URL that workers open, too; a relative path starts where the command is typed, which need not
be where they run."""

LocalPath = Annotated[str, AfterValidator(_refuse_url), AfterValidator(_from_here)]
"""In a config: what is read through libraries that know local files only; it starts where the command is typed, too."""

FileOrName = Annotated[str, AfterValidator(_file_from_here)]
"""In a config: a file, which may be a URL, where there is one of that name, else a name."""
