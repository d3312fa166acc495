"""Render chat templates as transformers does: jinja2 in a sandbox, with the names that templates of the hub expect.

A rendering also knows which of its characters a `generation` block made, and which came out of a message. Both are
enclosed in private characters while jinja2 runs, and the characters are taken out again.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date as Date
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from adapter.errors import AdapterError, RecordError

Span = tuple[int, int]
"""(first character, one past the last)."""

_GENERATED, _GIVEN = ("\U0010ff00", "\U0010ff01"), ("\U0010ff02", "\U0010ff03")
"""Private characters before and after what a `generation` block made, and what came out of a message."""

_MARK = re.compile(f"[{''.join((*_GENERATED, *_GIVEN))}]")
_LONGEST, _LARGEST = 1_000_000, 1_000
"""The longest value that a template may make by repeating one, and the largest base or exponent of a power."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message may carry its reasoning; the first is the one that templates read."""
_NO_TEXT = ("role", "type")
"""Keys of messages whose values name something and are no text."""


class Rendering(NamedTuple):
    """The text of a conversation."""

    text: str
    generated: list[Span]
    """Characters that `generation` blocks made, in order."""
    given: list[Span]
    """Characters of the messages' texts that were to be found, in order."""


class _Generation(Extension):
    """The `{% generation %} … {% endgeneration %}` block, which holds what the assistant says."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The call that encloses the block's text; jinja2 calls this at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

    @staticmethod
    def enclose(caller: Callable[[], str]) -> str:
        """The block's text between the marks of generated characters."""
        return f"{_GENERATED[0]}{caller()}{_GENERATED[1]}"


class _Namespace(Namespace):
    """A namespace whose attributes cannot reach Python's own, which begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # `self` may be the name of an attribute
        self, *positional = arguments
        attributes = dict(*positional, **named)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _Dict:
    """The `dict` of templates: it makes dictionaries and has nothing else of the type."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """A dictionary with these keys and one value."""
        return dict.fromkeys(keys, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON in readable characters; jinja2's own filter escapes what HTML does not allow."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which no product fills the memory: a template comes with a model, from anywhere."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return a product or a power. Raises SecurityError for values repeated too often, and large powers."""
        for one, other in ((left, right), (right, left)):
            if operator == "*" and hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > _LONGEST:
                raise jinja2.exceptions.SecurityError(
                    f"a template repeats a value {other:,} times; what it makes so may have {_LONGEST:,} items at most"
                )
        if operator == "**" and max(abs(left), abs(right)) > _LARGEST:
            raise jinja2.exceptions.SecurityError(
                f"a template takes the power {left} ** {right}: more than {_LARGEST:,}"
            )
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=16)
def compile_template(source: str, date: str) -> jinja2.Template:
    """Compile a chat template. date: the day, as YYYY-MM-DD, that `strftime_now` takes for today.

    Raises AdapterError for a template that jinja2 cannot parse, and for a date that is none.
    """
    try:
        today = Date.fromisoformat(date)
    except ValueError as error:
        raise AdapterError(f"the date of a chat template is written YYYY-MM-DD, got {date!r}") from error
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": today.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise AdapterError(f"not a chat template in jinja2: line {error.lineno}: {error.message}") from error


def render_chat(
    source: str,
    date: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    find: Callable[[str], bool] | None = None,
) -> Rendering:
    """Render messages, as `apply_chat_template` of transformers does with `tokenize=False`.

    find: chooses the texts of messages and tools whose characters are to be found in the rendering.

    Raises RecordError for a conversation that the template refuses or fails on, and for one whose texts are to be
    found and cannot be, because the template takes other decisions about them when they are marked.
    """
    chat = [_message(message) for message in messages]
    offered = None if tools is None else _plain(tools)
    template = compile_template(source, date)

    def run(chat: Any, offered: Any) -> str:
        variables = {**special_tokens, "messages": chat, "tools": offered, "documents": None}
        try:
            return template.render(**variables, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise RecordError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # whatever the template's own operations raise
            raise RecordError(
                f"the chat template fails on the conversation: {type(error).__name__}: {error}"
            ) from error

    rendered = run(chat, offered)
    text, generated = _MARK.sub("", rendered), _spans(rendered, _GENERATED)
    marked = [_mark(value, find) for value in (chat, offered)] if find else [chat, offered]
    if marked == [chat, offered]:
        return Rendering(text, generated, [])
    rendered = run(*marked)
    given = _spans(rendered, _GIVEN)
    if _MARK.sub("", rendered) != text or rendered.count(_GIVEN[0]) != rendered.count(_GIVEN[1]):
        raise RecordError(
            "a message spells a special token of the model, and the chat template changes the message by what it holds"
        )
    return Rendering(text, generated, given)


def _spans(rendered: str, marks: tuple[str, str]) -> list[Span]:
    """The characters between two marks, as their places in the text without any mark."""
    opened, spans = None, list[Span]()
    for number, mark in enumerate(_MARK.finditer(rendered)):
        place = mark.start() - number
        if mark[0] == marks[0]:
            opened = place
        elif mark[0] == marks[1] and opened is not None:
            spans.append((opened, place))
            opened = None
    return spans


def _mark(value: Any, find: Callable[[str], bool]) -> Any:
    """The value with marks in the texts that are to be found, inside their outer white space, which may be trimmed."""
    if isinstance(value, str) and find(value):
        text = value.strip()
        start = value.index(text)
        return f"{value[:start]}{_GIVEN[0]}{text}{_GIVEN[1]}{value[start + len(text) :]}"
    if isinstance(value, list):
        return [_mark(item, find) for item in value]
    if isinstance(value, dict):
        return {key: item if key in _NO_TEXT else _mark(item, find) for key, item in value.items()}
    return value


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it: without keys that hold nothing, its reasoning under all names that are read."""
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value in the types of JSON, which have no methods that a template could misuse.

    Raises RecordError for a text that holds one of the marks.
    """
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        if _MARK.search(value):
            raise RecordError("a message holds a private character of U+10FF00 to U+10FF03, which no text needs")
        return str.__str__(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__name__}>"
