"""Check a folder of lm-evaluation-harness's task files before the harness reads them.

The harness reads them with libyaml, which calls itself at each level of nesting, so that a file of a hundred thousand
brackets ends the process. Here libyaml first lists where values begin and end, which takes no call for a level.
"""

from pathlib import Path
from typing import Any

import yaml

from rayjobs.errors import ConfigError
from rayjobs.storage.yaml_file import check_size

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # which of both the harness reads with


class _Loader(_Base):
    """Builds plain values, and None in place of a function that a task file names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def check_task_files(folder: Path) -> None:
    """Check the task files of a folder, and those that they include, before anything of them is used.

    What is no YAML, or no file, is left to the harness. Raises ConfigError, naming the file, for one that is nested too
    deep or, by its aliases, too large.
    """
    pending, seen = sorted(folder.rglob("*.yaml"), reverse=True), set[Path]()
    while pending:
        path = pending.pop()
        try:
            path = path.expanduser().resolve()
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            pending += [path.parent / name for name in _included(path.read_bytes())]
        except ConfigError as error:
            raise ConfigError(f"task_folder: {path}: {error}; mend the file, or take it out of the folder") from error
        except Exception:  # of what the harness cannot read, it says why, or leaves the file out
            continue


def _included(content: bytes) -> list[str]:
    """The files that a task file includes. Raises ConfigError for one that is nested too deep or too large."""
    check_size(yaml.parse(content, Loader=_Base))
    values = yaml.load(content, Loader=_Loader)
    named = values.get("include", []) if isinstance(values, dict) else []
    return [str(name) for name in (named if isinstance(named, list) else [named])]
