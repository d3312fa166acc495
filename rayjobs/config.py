"""Job configs: frozen dataclasses ← YAML ← `section.key=value` overrides; every error at once, before Ray starts."""

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from rayjobs.errors import ConfigError
from rayjobs.storage.paths import resolve_path

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only, validated dataclass whose attribute docstrings are its help."""
    # defaults are validated too: a default path also starts where the command is typed
    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=settings)  # type: ignore[return-value]


def load(cls: type[T], given: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then a YAML file or plain values, then `section.key=value` overrides.

    Raises ConfigError listing every unknown key, wrong type and bad value by its path.
    """
    values, problems = given_values(given, overrides)
    try:
        built = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problems += [_explain(cls, item) for item in error.errors()]
    if problems:
        raise ConfigError("\n".join(problems))
    return built


def given_values(
    given: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What a file or plain values and overrides say, as they say it, and what is wrong with the overrides."""
    values: Any = copy.deepcopy(dict(given)) if isinstance(given, Mapping) else {}
    if given is not None and not isinstance(given, Mapping):
        path = given
        try:
            values = yaml.safe_load(resolve_path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the config file: {error.strerror or error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a config is a mapping of sections, got {type(values).__name__}")
    problems = [problem for override in overrides if (problem := _apply(values, override))]
    return values, problems


def to_dict(built: Any) -> dict[str, Any]:
    """A config as plain values, ready for YAML."""
    return TypeAdapter(type(built)).dump_python(built, mode="json")


def describe(cls: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every field of a config: (dotted name, type, default, meaning)."""
    for name, info in cls.__pydantic_fields__.items():
        section = next((kind for kind in (info.annotation, *get_args(info.annotation)) if is_dataclass(kind)), None)
        if section is not None:
            yield from describe(section, f"{prefix}{name}.")
            continue
        kind = str(info.annotation) if get_args(info.annotation) else info.annotation.__name__
        kind = re.sub(r"Annotated\[str, [^\]]*\]", "path", kind.replace("typing.", ""))
        default = "required"
        if not info.is_required():
            default = yaml.safe_dump(info.get_default(call_default_factory=True), default_flow_style=True)
        # A subclass's fields lose the docstrings that stand in its base.
        told = (getattr(base, "__pydantic_fields__", {}).get(name) for base in cls.__mro__)
        meaning = " ".join(next((field.description for field in told if field and field.description), "").split())
        yield prefix + name, kind, default.removesuffix("...\n").strip(), meaning


def _apply(values: dict[str, Any], override: str) -> str | None:
    """Sets one `section.key=value` in place; returns what is wrong with it, if anything."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        return f"{override!r}: an override looks like section.key=value"
    *sections, key = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            return f"{dotted}: {section!r} is a value, not a section"
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[key] = text
    return None


def _explain(cls: Any, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [name for name, *_ in describe(cls)]
        known += [".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {item['input']!r}" if key else message


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as {"section.key": text}."""
    found: dict[str, str] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: format_value(value)}
    return found


def format_value(value: Any) -> str:
    """A value as a reader likes it: nothing for None, thousands apart, six digits of a fraction."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, str) or value is None:
        return value or ""
    return json.dumps(value, ensure_ascii=False)
