"""The fields of a config: their types, defaults and help."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import TypeAdapter

from rayjobs.storage.paths import ShownAs


def field_type(kind: Any, keys: Sequence[str | int]) -> Any:
    """The annotation of the field that these keys lead to, a number being an item of a list; Any if there is none."""
    for key in keys:
        kind = next((found for member in members(kind) if (found := child_type(member, key)) is not None), Any)
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
    for member in members(kind):
        field = config_fields(member).get(key)
        if field is not None and not field.is_required():
            return TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")
    return MISSING


def config_fields(cls: Any) -> dict[str, Any]:
    return getattr(cls, "__pydantic_fields__", {})


def child_type(kind: Any, key: str | int) -> Any:
    """The type of the value that a value of this type has under a key or at a position; None if it has none there."""
    if is_dataclass(kind):
        return getattr(config_fields(kind).get(str(key)), "annotation", None)
    arguments = get_args(kind)
    if get_origin(kind) in (dict, Mapping):
        return arguments[1]
    return arguments[0] if isinstance(key, int) and arguments else None


def members(kind: Any) -> list[Any]:
    """The types of a union, or the one type, without their annotations."""
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in members(part)]
    return [kind]


def is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


class SectionHelp(NamedTuple):
    """The help of one section of a config."""

    name: str
    """The dotted key; empty for the fields of the config itself."""
    meaning: str
    fields: list["FieldHelp"]


class FieldHelp(NamedTuple):
    """The help of one config field."""

    name: str
    """The dotted key."""
    type: str
    """The values that it takes, with their bounds."""
    default: str
    """The default as it may be typed; `required` if there is none, or "required if `section` is given"."""
    meaning: str


def describe(cls: Any, prefix: str = "", given: Any = None, optional: str = "") -> Iterator[FieldHelp]:
    """The help of every field of a config and its sections.

    given: a default of the field that holds this config, whose values stand in place of the class's own defaults.
    optional: the key of the section that may be left out, with all required fields in it.
    """
    for name, info in config_fields(cls).items():
        key, default = prefix + name, MISSING
        if given is not None:
            default = getattr(given, name)
        elif not info.is_required():
            default = info.get_default(call_default_factory=True)
        section = section_type(info.annotation)
        if section is not None:
            inner = default if is_dataclass(default) else None
            yield from describe(section, f"{key}.", inner, key if default is None else optional)
            continue
        shown = "required" + (f" if `{optional}` is given" if optional else "")
        if default is not MISSING:
            shown = _shown(TypeAdapter(Any).dump_python(default, mode="json"))
        # A subclass's fields lose the docstrings that stand in its base.
        inherited = (config_fields(base).get(name) for base in cls.__mro__)
        meaning = next((field.description for field in inherited if field and field.description), "")
        kind, null, _ = type_name(info.annotation, info.metadata).partition(" or null")
        kind += _bounds(info.metadata) + null
        yield FieldHelp(key, kind, shown, " ".join(meaning.split()))


def describe_sections(cls: Any) -> list[SectionHelp]:
    """The help of a config by section: first the fields of the config itself, if it has any, then each section's."""
    sections: dict[str, list[FieldHelp]] = {"": []}
    for field in describe(cls):
        *parents, _ = field.name.split(".")
        for depth in range(len(parents) + 1):  # a section's own fields come before those of sections in it
            sections.setdefault(".".join(parents[:depth]), [])
        sections[".".join(parents)].append(field)
    return [SectionHelp(name, _meaning(cls, name), fields) for name, fields in sections.items() if fields]


def _meaning(cls: Any, section: str) -> str:
    """The meaning of a section: the docstring of the field that holds it, or else of its class."""
    if not section:
        return ""
    parent, _, key = section.rpartition(".")
    holder = section_type(field_type(cls, parent.split("."))) if parent else cls
    field = config_fields(holder)[key]
    doc = field.description or section_type(field.annotation).__doc__ or ""
    return " ".join(doc.split())


def _bounds(metadata: Sequence[Any]) -> str:
    """The bounds of a number, as they are shown behind its type: ` ≥ 1`, ` > 0 and ≤ 1`."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {value}" for name, sign in signs.items() for item in metadata if (value := _bound(item, name))]
    return f" {' and '.join(bounds)}" if bounds else ""


def _bound(item: Any, name: str) -> str:
    value = getattr(item, name, None)
    return "" if value is None else f"{value:g}"


def section_type(kind: Any) -> Any:
    """The config that a field of this type holds; None for a field that may also be a plain value, such as a list."""
    kinds = [member for member in members(kind) if member is not NoneType]
    return kinds[0] if kinds and all(is_dataclass(member) for member in kinds) else None


def type_name(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a user would write its values: `list[path]`, `int or null`, `fp32 | bf16`."""
    if shown := next((item.name for item in metadata if isinstance(item, ShownAs)), None):
        return shown
    arguments = get_args(kind)
    match get_origin(kind):
        case origin if origin is Annotated:
            return type_name(arguments[0], arguments[1:])
        case origin if origin in (Union, UnionType):
            return " or ".join(dict.fromkeys(type_name(argument) for argument in arguments))
        case origin if origin is Literal:
            return " | ".join(map(str, arguments))
        case origin if origin in (dict, Mapping):
            return "mapping" if arguments[1] is Any else f"mapping[{type_name(arguments[1])}]"
        case origin if origin is not None:
            return f"list[{', '.join(type_name(argument) for argument in arguments if argument is not ...)}]"
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
