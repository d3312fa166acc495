"""Job configs: frozen dataclasses ← YAML ← `section.key=value` overrides; all errors at once, before Ray starts."""

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from adapter.file_kind import check_content
from rayjobs.config_fields import (
    child_type,
    config_fields,
    describe,
    field_type,
    is_text,
    members,
    section_type,
    type_name,
)
from rayjobs.errors import ConfigError
from rayjobs.shipped_configs import find_config
from rayjobs.storage.yaml_file import parse_yaml, read_yaml

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only, validated dataclass whose attribute docstrings are its help."""
    # Defaults are validated too, so that a default path also starts where the command is typed.
    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=settings)  # type: ignore[return-value]


def load(
    cls: type[T],
    given: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> T:
    """Build `cls` from its defaults, then a YAML file or plain values, then overrides.

    One text or number stands for a list of it. Args:
        given: the file, or the name of a config of this package, or the values.
        overrides: `section.key=value` texts, as typed on a command line; or values by their dotted key.

    Raises ConfigError, which lists every unknown key, wrong type and bad value by its dotted key.
    """
    values, problems = given_values(cls, given, overrides)
    try:
        built = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problems += dict.fromkeys(_explain_all(cls, error.errors()))
    if problems:
        raise ConfigError("\n".join(problems))
    return built


def given_values(
    cls: Any, given: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] | Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The values of a file or mapping with overrides applied, and a message for each override that is malformed.

    cls: the config whose field types decide how an override's text is read.
    """
    values: Any = copy.deepcopy(dict(given)) if isinstance(given, Mapping) else {}
    if given is not None and not isinstance(given, Mapping):
        values = _read_config_file(given)
    if isinstance(overrides, Mapping):
        problems = [_set(values, key, copy.deepcopy(value)) for key, value in overrides.items()]
    else:
        problems = [_apply(cls, values, override) for override in overrides]
    return _with_lists(values, cls), [problem for problem in problems if problem]


def _read_config_file(path: str | Path) -> dict[str, Any]:
    file = find_config(path)
    check_content(file, ConfigError)
    try:
        values = read_yaml(file) or {}
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot read the config file: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {type(values).__name__}")
    return values


def _apply(cls: Any, values: dict[str, Any], override: str) -> str | None:
    """Apply one `section.key=value` in place. Returns what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r}: an override looks like section.key=value, without spaces"
    return _set(values, key, _parse(text, field_type(cls, key.split("."))))


def _set(values: dict[str, Any], dotted: str, value: Any) -> str | None:
    *sections, key = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            return f"{dotted}: {section!r} is a value, not a section"
    values[key] = value
    return None


def _parse(text: str, kind: Any) -> Any:
    """The value of an override for a field of this type.

    A field that holds text takes it verbatim: `#tag`, `42`, `yes`, quotes, newlines and nothing at all. Only `null` is
    None, and only where the field may be None. For any other field, the text is YAML.
    """
    kinds = members(kind)
    if all(member is NoneType or is_text(member) for member in kinds):
        return None if text == "null" and NoneType in kinds else text
    try:
        return parse_yaml(text)
    except ConfigError:
        return text  # the field's own error then shows it


def _with_lists(value: Any, kind: Any) -> Any:
    """The value with a text or number, where only a list of such is allowed, replaced by a list of it: `path: x.json`.

    kind: the type of the field that holds it.
    """
    if isinstance(value, Mapping):
        return {key: _with_lists(inner, field_type(kind, [key])) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_lists(item, field_type(kind, [0])) if isinstance(item, Mapping) else item for item in value]
    kinds = members(kind)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if not lists or any(kind not in lists and kind is not NoneType and not is_dataclass(kind) for kind in kinds):
        return value
    items = members(get_args(lists[0])[0])
    if any(get_origin(item) is list for item in items):
        inner = _with_lists(value, get_args(lists[0])[0])
        return [inner] if isinstance(inner, list) else value
    allowed: Any = str if any(map(is_text, items)) else str | int | float if Any in items else int | float
    return [value] if isinstance(value, allowed) else value


def to_dict(built: Any) -> dict[str, Any]:
    """A config as plain values, ready for YAML."""
    return TypeAdapter(type(built)).dump_python(built, mode="json")


def iter_paths(value: Any) -> Iterator[str]:
    """The paths, URLs and file names that a config holds, in its sections too, each once."""
    found: dict[str, str] = {}
    replace_paths(value, lambda path: found.setdefault(path, path))
    return iter(found)


def replace_paths(value: T, change: Callable[[str], str], is_path: bool = False) -> T:
    """A config with each path, URL and file name in it, and in its sections, replaced by `change(path)`.

    is_path: texts in `value` are of a field of paths, or of files or names.
    """
    changed: Any = value
    if is_dataclass(value):
        for name, info in config_fields(type(value)).items():
            before = getattr(value, name)
            after = replace_paths(before, change, _holds_paths(info))
            changed = changed if after is before else replace(changed, **{name: after})
    elif isinstance(value, Mapping):
        changed = {key: replace_paths(inner, change, is_path) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        changed = type(value)(replace_paths(inner, change, is_path) for inner in value)
    elif is_path and isinstance(value, str):
        changed = change(value)
    return value if changed == value else changed


def _holds_paths(field: Any) -> bool:
    return re.search(r"\bpath\b|\bfile or name\b", type_name(field.annotation, field.metadata)) is not None


_MISSING = ("missing", "missing_argument")
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""Pydantic's names of errors, of its dataclasses and of other types."""
_OTHER_TYPE = ("_type", "_parsing", "literal_error")
"""Ends of pydantic's names of errors about a value that is of another type."""


def _explain_all(cls: Any, items: Sequence[Any]) -> Iterator[str]:
    """Pydantic's errors as lines of ours. Of a union, it reports why the value is none of the members.

    A member that an error stands inside of is the one that was meant; where no member was, one line names them all.
    """
    by_key: dict[str, list[Any]] = {}
    for item in items:
        by_key.setdefault(_key(cls, item), []).append(item)
    missing = [key for key, [item, *_] in by_key.items() if item["type"] in _MISSING]
    for key, of_key in by_key.items():
        if key and any(other.startswith(f"{key}.") for other in by_key):
            continue
        bad = [item for item in of_key if not item["type"].endswith(_OTHER_TYPE)]  # of the type, but not allowed
        if len(of_key) > 1 and not bad:
            yield f"{key}: must be {type_name(field_type(cls, _split(key)))}, got {of_key[0]['input']!r}"
        else:
            yield from _explain(cls, (bad or of_key)[0], missing)


def _explain(cls: Any, item: Any, missing: Sequence[str]) -> list[str]:
    """One of pydantic's errors as lines of ours: the dotted key, what is wrong, the value.

    missing: the required keys that are not given. An unknown key of a section with one of them is taken for that one.
    """
    key = _key(cls, item)
    if item["type"] in _UNKNOWN:
        section = ".".join(_keys(cls, item["loc"][:-1]))
        siblings = [name for name in missing if section and name.rpartition(".")[0] == section]
        meant = siblings or _close_keys(cls, key, section)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        keys = f"{section or 'this job'} has {', '.join(_keys_of(cls, section))}"
        return [f"{key}: unknown key{hint} ({keys})" if hint else f"{key}: unknown key; {keys}"]
    if item["type"] in _MISSING:
        section = section_type(field_type(cls, item["loc"]))
        inner = [field.name for field in describe(section, f"{key}.") if field.default == "required"] if section else []
        return [f"{name}: required, but not given" for name in inner or [key]]
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if item["type"] == "value_error" and isinstance(item["input"], Mapping):  # of a section's fields, which it names
        return [f"{key}: {message}" if key else message]
    return [f"{key}: {message}, got {item['input']!r}" if key else message]


def _close_keys(cls: Any, key: str, section: str) -> list[str]:
    """The keys that an unknown one may stand for, the likeliest first: of its section, or else of any."""
    known = [field.name for field in describe(cls)]
    known += [".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)]
    last = key.rpartition(".")[2]
    siblings = _keys_of(cls, section) if section else []
    if not siblings:
        return difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)
    close = close or [name for name in siblings if last in name.split("_")]
    return [f"{section}.{name}" for name in close] or [name for name in known if name.rpartition(".")[2] == last]


def _keys_of(cls: Any, section: str) -> list[str]:
    """The keys that a section has, or, if it is empty, a whole config."""
    kinds = members(field_type(cls, _split(section)) if section else cls)
    return list(dict.fromkeys(key for kind in kinds for key in config_fields(kind)))


def _split(key: str) -> list[str | int]:
    """The parts of a dotted key, positions in a list as numbers."""
    return [int(part) if part.isdigit() else part for part in key.split(".")]


def _key(cls: Any, item: Any) -> str:
    """The dotted key that an error is about."""
    if item["type"] in _UNKNOWN:  # its last part is not the name of a union's member
        return ".".join([*_keys(cls, item["loc"][:-1]), str(item["loc"][-1])])
    return ".".join(_keys(cls, item["loc"]))


def _keys(kind: Any, location: Sequence[str | int]) -> Iterator[str]:
    """The keys of an error's location, without the names by which pydantic tells the members of a union apart."""
    for part in location:
        kinds = members(kind)
        child = next((found for member in kinds if (found := child_type(member, part)) is not None), None)
        if child is None and len(kinds) > 1 and isinstance(part, str):
            kind = next((member for member in kinds if getattr(member, "__name__", None) == part), kind)
            continue
        kind = child or Any
        yield str(part)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as {"section.key": text}."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = format_value(value)
    return flat


def format_value(value: Any) -> str:
    """A value for a table: empty for None, six significant digits of a fraction, commas between thousands."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, str) or value is None:
        return value or ""
    return json.dumps(value, ensure_ascii=False)
