"""Templates: what transformers renders, what is refused, and what a template cannot reach."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from adapter.errors import AdapterError, RecordError
from adapter.templates import (
    ALPACA,
    PLAIN,
    ChatTemplate,
    PromptTemplate,
    parse_template,
    read_template,
    template_fields,
)
from tests.adapter.chat_templates import ALL, CHATML, GEMMA_RAISES, LLAMA3, SPECIAL, TAGGED

TURNS = [
    {"role": "user", "content": " What is 2 & <3>?\n"},
    {"role": "assistant", "content": 'It\'s "five" – 五 😀'},
    {"role": "user", "content": "\n\nAnd\t{{ 7 }}?"},
    {"role": "assistant", "content": "{% raw %} nine", "thinking": "hm"},
]
SYSTEM = {"role": "system", "content": "Be terse."}
CALLS = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1, None]}}}]},
    {"role": "tool", "content": "<ok> & ü"},
    {"role": "assistant", "content": "done"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Ä <b>", "parameters": {"type": "object"}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "question": TURNS[:1],
    "assistant first": TURNS[1:],
    "calls": CALLS,
    "empty answer": [TURNS[0], {"role": "assistant", "content": ""}],
}


@pytest.fixture(scope="module")
def render_in_transformers() -> Iterator[Any]:
    """transformers' renderer, on the day that our templates take for today."""
    from transformers.utils import chat_template_utils

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Day":
            return cls(2024, 7, 26)

    def render(source: str, messages: list[dict[str, Any]], **given: Any) -> tuple[str, list[tuple[int, int]]]:
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        tagged = "generation %}" in source
        texts, spans = chat_template_utils.render_jinja_template(
            [chat], chat_template=source, return_assistant_tokens_mask=tagged, **given, **SPECIAL
        )
        return texts[0], spans[0] if tagged else []

    patch = pytest.MonkeyPatch()
    patch.setattr(chat_template_utils, "datetime", Day)
    yield render
    patch.undo()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prompt", [False, True])
def test_every_family_renders_as_in_transformers(name: str, prompt: bool, render_in_transformers: Any) -> None:
    compared = 0
    for messages in CONVERSATIONS.values():
        given = {"tools": TOOLS if messages is CALLS else None, "add_generation_prompt": prompt}
        try:
            expected = render_in_transformers(ALL[name], messages, **given)
        except Exception:
            with pytest.raises(RecordError, match=r"the chat template (refuses|fails on) the conversation: "):
                ChatTemplate(source=ALL[name]).render(messages, special_tokens=SPECIAL, **given)
            continue
        rendering = ChatTemplate(source=ALL[name]).render(messages, special_tokens=SPECIAL, **given)
        assert (rendering.text, rendering.generated) == expected
        marked = ChatTemplate(source=ALL[name]).render(
            messages, special_tokens=SPECIAL, find=lambda text: "2" in text or "ok" in text, **given
        )
        assert marked[:2] == rendering[:2]
        found = [rendering.text[start:end] for start, end in marked.given]
        texts = [message["content"].strip() for message in messages if "2" in str(message["content"])]
        assert [text for text in found if "ok" not in text] == texts
        compared += 1
    assert compared >= 3, "most conversations suit the template"


def test_today_is_a_day_that_is_saved_with_the_template(render_in_transformers: Any) -> None:
    template = ChatTemplate(source=LLAMA3)
    assert "Today Date: 26 Jul 2024\n" in template.render(TURNS, special_tokens=SPECIAL).text
    other = ChatTemplate(source=LLAMA3, date="2031-02-03")
    assert "Today Date: 03 Feb 2031\n" in other.render(TURNS, special_tokens=SPECIAL).text
    assert parse_template(json.loads(json.dumps(template_fields(other)))) == other
    with pytest.raises(AdapterError, match=r"date of a chat template is written YYYY-MM-DD, got '3\.2\.31'"):
        ChatTemplate(source=LLAMA3, date="3.2.31")


def test_what_a_template_refuses_or_fails_on_is_one_record_s_error() -> None:
    def error(source: str, messages: list[dict[str, Any]]) -> str:
        with pytest.raises(RecordError) as raised:
            ChatTemplate(source=source).render(messages, special_tokens=SPECIAL)
        return str(raised.value)

    assert error(GEMMA_RAISES, [SYSTEM, *TURNS]).endswith("refuses the conversation: System role not supported")
    assert "roles must alternate" in error(GEMMA_RAISES, TURNS[1:])
    assert "fails on the conversation: ZeroDivisionError" in error("{{ 1 / 0 }}", TURNS)
    assert "has no attribute 'content'" in error(CHATML, [{"role": "user", "content": None}, *TURNS])
    assert "private character" in error(CHATML, [{"role": "user", "content": "\U0010ff02"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[0] }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__subclasses__() }}",
        "{% for i in range(10 ** 7) %}{% endfor %}",
        "{{ (1).__reduce__() }}",
    ],
)
def test_a_template_reaches_nothing_of_python(source: str) -> None:
    with pytest.raises(RecordError, match="the chat template"):
        ChatTemplate(source=source).render(TURNS, special_tokens=SPECIAL)


@pytest.mark.parametrize("large", ["2147483648 * 'a'", "messages * 10 ** 6", "9 ** 9 ** 9", "'ab' * 10 ** 6"])
def test_a_product_that_would_fill_the_memory_is_refused(large: str) -> None:
    with pytest.raises(RecordError, match=r"a template (repeats a value|takes the power)"):
        ChatTemplate(source=f"{{{{ {large} }}}}").render(TURNS, special_tokens=SPECIAL)
    small = ChatTemplate(source="{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}").render(TURNS, special_tokens=SPECIAL)
    assert small.text == "---102412"


def test_objects_become_plain_data_that_templates_cannot_call() -> None:
    class Loud(str):
        def shout(self) -> str:
            return "loud"

    message = {"role": "user", "content": Loud("quiet"), "file": Path("a"), "number": 1.5, "parts": ("a", {"b": True})}
    rendering = ChatTemplate(source="{{ messages | tojson }}{{ messages[0].content.shout is defined }}")
    assert rendering.render([message], special_tokens={}).text == (
        '[{"role": "user", "content": "quiet", "file": "<PosixPath>", "number": 1.5, "parts": ["a", {"b": true}]}]False'
    )


def test_templates_come_from_files_and_headers(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(TAGGED)
    assert read_template(tmp_path / "a.jinja") == ChatTemplate(source=TAGGED)
    (tmp_path / "b.jinja").write_text("a\n{% if %}")
    with pytest.raises(AdapterError, match=r"b\.jinja: not a chat template in jinja2: line 2: "):
        read_template(tmp_path / "b.jinja")
    template = PromptTemplate(with_input="{instruction}{input}", without_input="{instruction}", later="+{instruction}")
    (tmp_path / "c.json").write_text(json.dumps({**template_fields(template)}))
    assert read_template(tmp_path / "c.json") == template
    assert template.render_later("{input}") == "+{input}"
    (tmp_path / "d.json").write_text(json.dumps({**template_fields(template), "later": "?"}))
    with pytest.raises(AdapterError, match=r"d\.json: prompt template 'later' must contain \{instruction\}"):
        read_template(tmp_path / "d.json")
    assert PLAIN.render("a", "b") == "a\n\nb"
    for saved in (ALPACA, PLAIN, template):
        assert parse_template(template_fields(saved)) == saved
    other = {**template_fields(ALPACA), "later": ["{instruction}"]}
    for fields in ({}, 5, {"kind": "chat"}, {"kind": "other", "source": "a"}, {"kind": "chat", "source": 5}, other):
        with pytest.raises(AdapterError, match="not a template"):
            parse_template(fields)
