"""The files of a model on the hub: settings, tokenizer and one copy of the weights of a base; the file of an adapter.

A repository often holds the same weights in several formats; only the one that is read here is fetched.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rayjobs.errors import StorageError
from rayjobs.storage.hub import HubPath, ask_hub, hub_copy, hub_snapshot, pin

logger = logging.getLogger(__name__)

TRAINED_RECORDS_FILE = "trained_records.json"
"""Digests of the records that an adapter was trained on (`rayjobs.data.trained_records`)."""

SETTINGS = ("*.json", "*.jinja", "*.yaml", "tokenizer.model*", "merges.txt")
"""Patterns of the small files in a repository's top folder."""
TEMPLATES = "additional_chat_templates/"

WEIGHTS = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "consolidated.??.pth",
)
"""Patterns of a base's weights, in the order of preference."""

ADAPTER_FILE = "adapter.safetensors"
ADAPTERS = (ADAPTER_FILE, "adapter_model.safetensors", "adapter_model.bin")
"""Names of an adapter's file: this project's, and PEFT's."""


@dataclass(frozen=True)
class ModelFiles:
    """The files that are read here, {name: size in bytes}."""

    settings: Mapping[str, int]
    weights: Mapping[str, int]
    """A base's weights, or the one file that was asked for; none in the repository of an adapter."""
    adapters: Mapping[str, int]

    @classmethod
    def choose(cls, listed: Mapping[str, int], file: str = "") -> "ModelFiles":
        """Choose from a repository's files; or `file` alone, which has all in it, as a .gguf has."""
        if file:
            return cls({}, {name: listed[name] for name in listed if name == file}, {})
        top = [name for name in listed if "/" not in name]
        small = [name for name in top if any(fnmatch(name, pattern) for pattern in SETTINGS)]
        small += [name for name in listed if name.startswith(TEMPLATES)]
        matching = ([name for name in top if fnmatch(name, pattern)] for pattern in WEIGHTS)
        names = small, next(filter(None, matching), []), [name for name in top if name in ADAPTERS]
        return cls(*({name: listed[name] for name in chosen} for chosen in names))


def model_copy(path: str | Path, *, weights: bool = True) -> Path:
    """The local copy of a model on the hub: the folder of a base or of PEFT's adapter, or this project's adapter file.

    A path that names a file in a repository, such as a .gguf, stands for that file. What the hub's cache lacks is
    fetched; if `weights` is False, all but the weights in a base's folder.

    Raises StorageError if the hub has no such model or cannot be reached, FileNotFoundError if it has no such file.
    """
    hub = HubPath.parse(pin(str(path)))
    if hub.repo_type != "model":
        return hub_copy(hub)
    files = _list_files(hub)
    missing = _missing(hub, files)
    wanted = {**files.settings, **files.adapters, **(files.weights if weights or hub.file else {})}
    if fetched := [size for name, size in missing.items() if name in wanted]:
        logger.info("fetching %s from the hub: %s", hub, format_bytes(sum(fetched)))
    if hub.file:
        return hub_copy(hub, progress=bool(fetched))
    folder = hub_snapshot(hub.repo_id, revision=hub.revision, allow_patterns=list(wanted), progress=bool(fetched))
    return folder / ADAPTER_FILE if ADAPTER_FILE in files.adapters and not files.weights else folder


def bytes_to_fetch(path: str | Path) -> int:
    """The size of a model's weights that the hub's cache on this machine lacks. Raises StorageError."""
    hub = HubPath.parse(pin(str(path)))
    files = _list_files(hub)
    return sum(size for name, size in _missing(hub, files).items() if name in files.weights)


def format_bytes(size: float) -> str:
    """A size in the unit that a person would choose, such as 16.1 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.0f} bytes" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"


def _list_files(hub: HubPath) -> ModelFiles:
    """The files of a repository that are read here; of one without weights the settings, such as a tokenizer.

    Raises StorageError if there are none, or if a file must be named.
    """
    from huggingface_hub.hf_api import RepoFile

    listed: dict[str, int] = ask_hub(
        hub,
        lambda api: {
            file.path: file.size
            for file in api.list_repo_tree(hub.repo_id, recursive=True, revision=hub.revision)
            if isinstance(file, RepoFile)
        },
        lambda folder: _list_cached(folder, hub.file),
    )
    files = ModelFiles.choose(listed, hub.file)
    if hub.file and not files.weights:
        raise FileNotFoundError(f"{hub}: the repository has no such file")
    quantized = [name for name in listed if name.endswith(".gguf")]
    if quantized and not files.weights and not files.adapters:
        raise StorageError(f"{hub}: the repository holds GGUF files, of which one must be named: {hub}/{quantized[0]}")
    if not hub.file and not any((files.settings, files.adapters, files.weights)):
        held = ", ".join(sorted(listed)[:8])
        raise StorageError(f"{hub}: the repository holds no model in a known format; its files are {held}")
    return files


def _list_cached(folder: Path, file: str) -> dict[str, int]:
    """The files of a folder in the cache. Raises FileNotFoundError if no weights are among them."""
    listed = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files = ModelFiles.choose(listed, file)
    if not files.weights and not files.adapters:
        raise FileNotFoundError(f"{folder}: no weights")
    return listed


def _missing(hub: HubPath, files: ModelFiles) -> dict[str, int]:
    """The files that the cache lacks."""
    from huggingface_hub import try_to_load_from_cache

    return {
        name: size
        for name, size in {**files.settings, **files.adapters, **files.weights}.items()
        if not isinstance(try_to_load_from_cache(hub.repo_id, name, revision=hub.revision), str)
    }
