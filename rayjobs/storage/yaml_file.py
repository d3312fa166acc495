"""Read and write YAML 1.2, in which `5e8` is a number and `yes`, `on` and `2026-01-01` are text."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from rayjobs.errors import ConfigError
from rayjobs.storage.files import write_text
from rayjobs.storage.paths import read_bytes

_DEEPEST, _MOST_VALUES = 60, 1_000_000


class _Constructor(SafeConstructor):
    """Builds plain values. A date stays text, as in YAML 1.2's core schema, and as JSON needs it."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document. Raises ConfigError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        check_size(yaml.parse(text))
        return yaml.load(text)
    except (YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        # all but the first are what the library's constructors raise over odd tags, keys, numbers and depths
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error


def check_size(events: Iterable[Any]) -> None:
    """Check the size of a document by its parser's events, ruamel's or PyYAML's, before a value is built of them.

    An alias counts as all that it stands for: it can hold itself, or grow twofold from line to line, and what a `<<`
    merges is copied. Raises ConfigError for a document that is nested too deep or too large.
    """
    sizes: dict[str, tuple[int, int]] = {}
    """Anchor → values and levels of what it names."""
    pending: list[list[Any]] = [[None, 0, 0]]
    """Anchor, values and levels so far of each value that is not complete."""
    for event in events:
        kind, anchor = type(event).__name__, getattr(event, "anchor", None) or ""
        if kind in ("SequenceStartEvent", "MappingStartEvent"):
            sizes[anchor] = (_MOST_VALUES, 0)  # until it is complete, only an alias inside of it asks
            pending.append([anchor, 1, 1])
        elif kind in ("SequenceEndEvent", "MappingEndEvent", "ScalarEvent", "AliasEvent"):
            if kind == "AliasEvent":
                values, levels = sizes.get(anchor, (1, 0))
            elif kind == "ScalarEvent":
                values, levels = sizes[anchor] = (1, 0)
            else:
                anchor, values, levels = pending.pop()
                sizes[anchor] = (values, levels)
            pending[-1][1] += values
            pending[-1][2] = max(pending[-1][2], levels + 1)
        if pending[-1][1] > _MOST_VALUES or len(pending) + pending[-1][2] > _DEEPEST + 2:
            raise ConfigError(
                f"not usable YAML: over {_MOST_VALUES:,} values or {_DEEPEST} levels, by an alias that repeats itself?"
            )


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file. Raises ConfigError, which names the file, and OSError."""
    try:
        return parse_yaml(read_bytes(path).decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_yaml(path: str | Path, value: Any) -> None:
    """Write plain values atomically, keys in the order given, a line each."""
    write_text(path, dump_yaml(value))


def dump_yaml(value: Any) -> str:
    """Plain values as YAML, keys in the order given, a line each."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # annotated as None
    yaml.allow_unicode, yaml.width = True, 1 << 20
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()
