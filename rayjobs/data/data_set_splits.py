"""Choose the files of one split of a data set's folder.

A folder says in one of these ways which splits it has, and the first that applies counts:

1. It was saved by `datasets`: `dataset_dict.json` names the splits, and `state.json` the files of each.
2. Its `README.md` declares them under `configs`, as data sets on the Hugging Face hub do.
3. The names of its files or folders hold `train`, `test`, `validation`, `val`, `valid`, `dev` or `eval` as a word.

A folder without splits is read whole.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapter.json_object import parse_json
from adapter.records.files import is_record_file
from rayjobs.errors import ConfigError, DataError
from rayjobs.storage.yaml_file import parse_yaml

_STATE, _INFO = "state.json", "dataset_info.json"
_NO_RECORDS = (_STATE, _INFO, "dataset_dict.json", "dataset_infos.json")
"""Files about a data set."""

_SAME_SPLIT = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Names of splits that mean the same."""

_WORD = {word: name for name, words in _SAME_SPLIT.items() for word in words}

Fetch = Callable[[str], Path]
"""Gives a local copy of a file of the folder by its name."""


def choose_split(path: str, names: Sequence[str], split: str, role: str, fetch: Fetch) -> list[str]:
    """The names of the files of one split, in order.

    names: all files in the folder. split: the split that is wanted; empty for the one of the role: `train`, `val` or
    `test`.
    Raises DataError for a folder without the split, and ConfigError for one of several data sets.
    """
    splits = _saved_splits(path, names, fetch)
    if splits is None:
        splits = _declared_splits(path, names, fetch)
    if splits is None:
        splits = _named_splits(names)
    if list(splits) == [""] and not split:
        return splits[""]
    wanted = split or role
    if wanted in splits:
        return splits[wanted]
    same = [name for name in _SAME_SPLIT.get(_WORD.get(wanted, ""), ()) if name in splits]
    if same:
        return splits[same[0]]
    if not splits:
        return []
    listed = ", ".join(name for name in splits if name) or "none"
    raise DataError(f"{path}: no split {wanted!r}; its splits are {listed}: name one, as {{path: …, split: …}}")


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern matches, in which `*` stays within a folder and `**` does not.

    Raises DataError for what is no pattern, such as `a**`.
    """
    from fsspec.utils import glob_translate

    try:
        expression = re.compile(glob_translate(pattern))
    except (ValueError, re.error) as error:
        raise DataError(
            f"{pattern!r:.80} is no pattern of files ({error}); ** stands between slashes, as in data/**/*.parquet"
        ) from error
    return [name for name in names if expression.match(name)]


def _saved_splits(path: str, names: Sequence[str], fetch: Fetch) -> dict[str, list[str]] | None:
    """The splits of a folder that `datasets` saved; a single data set has no name for its one. None for others."""
    splits = {}
    for state in names:
        folder, _, name = state.rpartition("/")
        if name != _STATE or f"{folder}/{_INFO}".lstrip("/") not in names or "/" in folder:
            continue
        try:
            listed = parse_json(fetch(state).read_text(encoding="utf-8"))["_data_files"]
            splits[folder] = [f"{folder}/{file['filename']}".lstrip("/") for file in listed]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}/{state}: not the state of a saved data set ({error})") from error
        if missing := [file for file in splits[folder] if file not in names]:
            raise DataError(f"{path}: {missing[0]}, which {state} names, is missing")
    return splits or None


def _declared_splits(path: str, names: Sequence[str], fetch: Fetch) -> dict[str, list[str]] | None:
    """The splits that the folder's README.md declares; None if it declares none."""
    if "README.md" not in names:
        return None
    text = fetch("README.md").read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        card = parse_yaml(header[1]) if header else None
    except ConfigError:
        return None
    configs = card.get("configs") if isinstance(card, dict) else None
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    if not configs:
        return None
    default = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
    if len(configs) > 1 and not default:
        subsets = "; ".join(f"{config.get('config_name')}: {_patterns(config)}" for config in configs[:8])
        raise ConfigError(f"{path}: it has several subsets, of which one must be named by its files: {subsets}")
    config = default[0] if default else configs[0]
    if not _entries(config):
        folder = str(config.get("data_dir") or "").strip("./")
        return _named_splits([name for name in names if name.startswith(f"{folder}/" if folder else "")])
    splits: dict[str, list[str]] = {}
    for entry in _entries(config):
        listed = entry.get("path")
        patterns = listed if isinstance(listed, list) else [listed] if listed else []
        matched = [name for pattern in patterns for name in matching(str(pattern).removeprefix("./"), names)]
        splits[str(entry.get("split", "train"))] = list(dict.fromkeys(filter(is_record_file, matched)))
    return {split: files for split, files in splits.items() if files} or None


def _entries(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of a declared data set as [{split, path}, …]."""
    files = config.get("data_files")
    if isinstance(files, dict):
        return [{"split": split, "path": path} for split, path in files.items()]
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        return files
    return [{"split": "train", "path": files}] if files else []


def _patterns(config: dict[str, Any]) -> str:
    return ", ".join(str(entry.get("path")) for entry in _entries(config)) or str(config.get("data_dir", "no files"))


def _named_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """The splits that files or their folders name; without any, one without a name that has all files."""
    splits: dict[str, list[str]] = {}
    for name in names:
        if not is_record_file(name) or name.split("/")[-1] in _NO_RECORDS:
            continue
        file, *folders = reversed(name.split("/"))
        words = [word for part in (file, *folders) for word in re.split(r"[-._ 0-9]+", part.lower())]
        splits.setdefault(next((_WORD[word] for word in words if word in _WORD), ""), []).append(name)
    if len(splits) > 1:
        splits.pop("", None)  # such as a list of labels beside the splits
    return splits
