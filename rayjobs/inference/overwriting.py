"""Refuse to write a result over a file that the job needs."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rayjobs.errors import ConfigError
from rayjobs.storage.paths import is_url, resolve_path


def check_output(out: str, inputs: Iterable[str], *, setting: str = "out") -> None:
    """Raise ConfigError if `out` is one of the inputs, also by a link, or a file that cannot be written there.

    inputs: files and folders that the job needs, local or at URLs, and names that may be no files. The file of settings
    on the command line counts as one.
    """
    target = resolve_path(out)
    if is_url(out):
        if any(is_url(path) and str(resolve_path(path)) == str(target) for path in inputs):
            raise ConfigError(f"{setting} is {out}, which the job needs: choose another file")
        return
    if target.is_dir():
        raise ConfigError(f"{setting} is {out}, a folder: name a file in it")
    words = [word.removeprefix("--config=") for word in sys.argv[1:]]
    for path in [*inputs, *filter(os.path.isfile, words)]:
        if not is_url(path) and (same := _same_file(target, Path(path))):
            raise ConfigError(
                f"{setting} is {out}, which would overwrite {same}, a file that the job needs: choose another file"
            )
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{setting} is {out}, but {folder} is no folder that can be written to")


def _same_file(target: Path, path: Path) -> Path | None:
    """The file that `target` is too: `path`, or one in the folder `path`; None if there is none."""
    files = path.iterdir() if path.is_dir() else [path]
    return next((file for file in files if file.absolute() == target or _samefile(file, target)), None)


def _samefile(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return False
