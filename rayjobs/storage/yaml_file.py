"""Read and write YAML 1.2, in which `5e8` is a number and `yes`, `on` and `2026-01-01` are text."""

import io
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
        value = yaml.load(text)
    except (YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # all but the first are what the library's constructors raise over odd tags, keys, numbers and depths
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Raise ConfigError for a value that is nested too deep or too large: an alias can hold itself, or grow twofold."""
    pending, count = [(value, 0)], 0
    while pending:
        held, depth = pending.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise ConfigError(
                f"not usable YAML: over {_MOST_VALUES:,} values or {_DEEPEST} levels, by an alias that repeats itself?"
            )
        inner = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
        pending += [(one, depth + 1) for one in inner]


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
