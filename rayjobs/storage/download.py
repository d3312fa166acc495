"""Copy what a URL names to this machine, once for each content."""

import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from rayjobs.storage.fingerprint import fingerprint, remote_fingerprint
from rayjobs.storage.hub import is_hub_path
from rayjobs.storage.hub_model import model_copy
from rayjobs.storage.paths import as_storage_error, check_reachable, is_url, resolve_path


def cached_path(path: str | Path, *, weights: bool = True) -> Path:
    """A local path as it is; for a URL, a local copy of its file or folder, downloaded unless its content is there.

    Copies are kept in `$XDG_CACHE_HOME/rayjobs`, by default `~/.cache/rayjobs`, and those of the Hugging Face hub in
    the hub's own cache. All processes of a machine share them. Raises FileNotFoundError if the URL names nothing,
    StorageError if it cannot be reached.

    weights: False to leave a base's weights on the hub, for its settings or its tokenizer alone.
    """
    if is_hub_path(path):
        return model_copy(path, weights=weights)
    if not is_url(path):
        return Path(path)
    remote: Any = resolve_path(path)
    with as_storage_error(path, "read"):
        files = remote.fs.find(remote.path, detail=True)
    if not files:
        check_reachable(path)
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    content = [[file.removeprefix(remote.path), remote_fingerprint(info)] for file, info in sorted(files.items())]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "rayjobs" / fingerprint([str(path), content])[:20]
    copy = folder / remote.name
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # one process downloads; the others wait for its copy
            if not copy.exists():
                unfinished = folder / "unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
                with as_storage_error(path, "copied"):
                    remote.fs.get(remote.path, str(unfinished / remote.name), recursive=list(files) != [remote.path])
                os.replace(unfinished / remote.name, copy)
    return copy
