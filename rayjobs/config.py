"""Job configs: frozen dataclasses ← YAML ← `section.key=value` overrides; all errors at once, before Ray starts."""

import copy
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from rayjobs.errors import ConfigError
from rayjobs.storage.paths import ShownAs
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

    Args:
        overrides: `section.key=value` texts, as typed on a command line; or values by their dotted key.

    Raises ConfigError, which lists every unknown key, wrong type and bad value by its dotted key.
    """
    values, problems = given_values(cls, given, overrides)
    try:
        built = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        missing = [".".join(_keys(cls, item["loc"])) for item in error.errors() if item["type"] in _MISSING]
        problems += dict.fromkeys(line for item in error.errors() for line in _explain(cls, item, missing))
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
    return values, [problem for problem in problems if problem]


def _read_config_file(path: str | Path) -> dict[str, Any]:
    try:
        values = read_yaml(path) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot read the config file: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {type(values).__name__}")
    return values


def _apply(cls: Any, values: dict[str, Any], override: str) -> str | None:
    """Apply one `section.key=value` in place. Returns what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r}: an override looks like section.key=value"
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
    None, and only where the field may be None. For any other field, the text is YAML; one item stands for a list of it.
    """
    kinds = _members(kind)
    if all(member is NoneType or _is_text(member) for member in kinds):
        return None if text == "null" and NoneType in kinds else text
    try:
        value = parse_yaml(text)
    except ConfigError:
        return text  # the field's own error then shows it
    return [value] if _is_item(value, kinds) else value


def _is_item(value: Any, kinds: Sequence[Any]) -> bool:
    """True for a text or number where only a list of such is allowed: `data.path=x.json`."""
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if not lists or any(kind not in lists and kind is not NoneType and not is_dataclass(kind) for kind in kinds):
        return False
    holds_text = any(map(_is_text, _members(get_args(lists[0])[0])))
    return isinstance(value, str) if holds_text else isinstance(value, int | float)


def field_type(kind: Any, keys: Sequence[str | int]) -> Any:
    """The annotation of the field that these keys lead to, a number being an item of a list; Any if there is none."""
    for key in keys:
        kind = next((found for member in _members(kind) if (found := _child(member, key)) is not None), Any)
    return kind


class _Missing:
    def __repr__(self) -> str:
        return "not set"


MISSING: Any = _Missing()
"""Stands for a value where there is none, not even null."""


def field_default(kind: Any, key: str) -> Any:
    """The default, as a plain value, of the field that a config, or a config among a union's members, has under a key.

    MISSING if there is no such field, or it is required.
    """
    for member in _members(kind):
        field = _config_fields(member).get(key)
        if field is not None and not field.is_required():
            return TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")
    return MISSING


def _config_fields(cls: Any) -> dict[str, Any]:
    return getattr(cls, "__pydantic_fields__", {})


def _child(kind: Any, key: str | int) -> Any:
    """The type of the value that a value of this type has under a key or at a position; None if it has none there."""
    if is_dataclass(kind):
        return getattr(_config_fields(kind).get(str(key)), "annotation", None)
    arguments = get_args(kind)
    if get_origin(kind) in (dict, Mapping):
        return arguments[1]
    return arguments[0] if isinstance(key, int) and arguments else None


def _members(kind: Any) -> list[Any]:
    """The types of a union, or the one type, without their annotations."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in _members(part)]
    return [kind]


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


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
        for name, info in _config_fields(type(value)).items():
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
    return re.search(r"\bpath\b|\bfile or name\b", _type_name(field.annotation, field.metadata)) is not None


class FieldHelp(NamedTuple):
    """The help of one config field."""

    name: str
    """The dotted key."""
    type: str
    default: str
    """The default as it may be typed; `required` if there is none, or "required if `section` is given"."""
    meaning: str


def describe(cls: Any, prefix: str = "", given: Any = None, optional: str = "") -> Iterator[FieldHelp]:
    """The help of every field of a config and its sections.

    given: a default of the field that holds this config, whose values stand in place of the class's own defaults.
    optional: the key of the section that may be left out, with all required fields in it.
    """
    for name, info in _config_fields(cls).items():
        key, default = prefix + name, MISSING
        if given is not None:
            default = getattr(given, name)
        elif not info.is_required():
            default = info.get_default(call_default_factory=True)
        section = _section(info.annotation)
        if section is not None:
            inner = default if is_dataclass(default) else None
            yield from describe(section, f"{key}.", inner, key if default is None else optional)
            continue
        shown = "required" + (f" if `{optional}` is given" if optional else "")
        if default is not MISSING:
            shown = _shown(TypeAdapter(Any).dump_python(default, mode="json"))
        # A subclass's fields lose the docstrings that stand in its base.
        inherited = (_config_fields(base).get(name) for base in cls.__mro__)
        meaning = next((field.description for field in inherited if field and field.description), "")
        yield FieldHelp(key, _type_name(info.annotation, info.metadata), shown, " ".join(meaning.split()))


def _section(kind: Any) -> Any:
    """The config that a field of this type holds; None for a field that may also be a plain value, such as a list."""
    kinds = [member for member in _members(kind) if member is not NoneType]
    return kinds[0] if kinds and all(is_dataclass(member) for member in kinds) else None


def _type_name(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a user would write its values: `list[path]`, `int or null`, `fp32 | bf16`."""
    if shown := next((item.name for item in metadata if isinstance(item, ShownAs)), None):
        return shown
    arguments = get_args(kind)
    match get_origin(kind):
        case origin if origin is Annotated:
            return _type_name(arguments[0], arguments[1:])
        case origin if origin in (Union, UnionType):
            return " or ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
        case origin if origin is Literal:
            return " | ".join(map(str, arguments))
        case origin if origin in (dict, Mapping):
            return "mapping" if arguments[1] is Any else f"mapping[{_type_name(arguments[1])}]"
        case origin if origin is not None:
            return f"list[{', '.join(_type_name(argument) for argument in arguments if argument is not ...)}]"
    if is_dataclass(kind):
        return f"{{{', '.join(field.name for field in fields(kind))}}}"
    return {NoneType: "null", str: "text", bool: "true | false", Any: "any value"}.get(kind) or kind.__name__


def _shown(value: Any) -> str:
    """A default as it may be typed: a path in the current folder without that folder."""
    here = os.getcwd()
    value = "" if value == here else value
    if isinstance(value, str) and value:
        return value.removeprefix(f"{here}{os.sep}")
    return json.dumps(value, ensure_ascii=False)


_MISSING = ("missing", "missing_argument")


def _explain(cls: Any, item: Any, missing: Sequence[str]) -> list[str]:
    """One of pydantic's errors as lines of ours: the dotted key, what is wrong, the value.

    missing: the required keys that are not given. An unknown key of a section with one of them is taken for that one.
    """
    key = ".".join(_keys(cls, item["loc"]))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = ".".join(_keys(cls, item["loc"][:-1]))
        key = ".".join(filter(None, [section, str(item["loc"][-1])]))  # not a name of a union's member
        if section and (siblings := [name for name in missing if name.rpartition(".")[0] == section]):
            return [f"{key}: unknown key; did you mean {siblings[0]}?"]
        known = [field.name for field in describe(cls)]
        known += [".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return [f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")]
    if item["type"] in _MISSING:
        section = _section(field_type(cls, item["loc"]))
        inner = [field.name for field in describe(section, f"{key}.") if field.default == "required"] if section else []
        return [f"{name}: required, but not given" for name in inner or [key]]
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return [f"{key}: {message}, got {item['input']!r}" if key else message]


def _keys(kind: Any, location: Sequence[str | int]) -> Iterator[str]:
    """The keys of an error's location, without the names by which pydantic tells the members of a union apart."""
    for part in location:
        kinds = _members(kind)
        child = next((found for member in kinds if (found := _child(member, part)) is not None), None)
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
