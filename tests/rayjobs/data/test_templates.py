"""The template of each source: the one that is named, the adapter's, or what suits the records."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter.adapter_formats import prompt_file
from adapter.errors import AdapterError
from adapter.records import scienceqa
from adapter.templates import ALPACA, PLAIN, ChatTemplate, PromptTemplate
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer
from rayjobs.config import load
from rayjobs.data.records import DataConfig, Source
from rayjobs.data.templates import describe_sources, header_templates, named_template, saved_template, source_templates
from rayjobs.errors import ConfigError

CHAT = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
ADAPTER = prompt_file(torch.zeros(1, 2, 3), torch.zeros(1, 1), base_layers=1)
RECORDS = {
    "alpaca": {"instruction": "i", "output": "o"},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "text": {"text": "t"},
}


@pytest.fixture
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Source]:
    """A file of each format, whose first record is bad."""
    for name, record in RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text("5\n" + json.dumps(record) + "\n")
    paths = [str(tmp_path / f"{name}.jsonl") for name in RECORDS]
    data = load(DataConfig, {"path": [*paths, {"path": paths[2], "format": "llava"}]})
    return dict(zip([*RECORDS, "llava"], data.sources(), strict=True))


def test_each_kind_of_records_has_a_template_that_suits_it(sources: dict[str, Source], tokenizer: Tokenizer) -> None:
    bare = dict(zip(sources, source_templates(sources.values(), tokenizer), strict=True))
    assert bare == {
        **dict.fromkeys(("alpaca", "messages", "sharegpt", "llava"), ALPACA),
        **dict.fromkeys(("prompt_completion", "text"), PLAIN),
    }
    tokenizer.chat_template = CHAT
    chats = dict(zip(sources, source_templates(sources.values(), tokenizer), strict=True))
    own = ChatTemplate(source=CHAT)
    assert chats == {**bare, "messages": own, "sharegpt": own}
    described = describe_sources([sources["alpaca"], sources["messages"]], [ALPACA, own])
    assert "alpaca.jsonl: alpaca, in the template alpaca; " in described
    assert described.endswith("messages.jsonl: messages, in a chat template")
    problems = replace(sources["alpaca"], format="scienceqa")
    assert source_templates([problems], tokenizer) == [scienceqa.TEMPLATE]


def test_of_mixed_records_the_first_that_needs_a_template_chooses_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = CHAT
    for order, expected in (
        (("text", "prompt_completion", "messages", "alpaca"), ChatTemplate(source=CHAT)),
        (("prompt_completion", "alpaca", "messages"), ALPACA),
    ):
        (tmp_path / "mixed.jsonl").write_text("\n".join(json.dumps(RECORDS[name]) for name in order))
        sources = load(DataConfig, {"path": str(tmp_path / "mixed.jsonl")}).sources()
        assert source_templates(sources, tokenizer) == [expected]


def test_a_template_is_named_or_is_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert [named_template(name, tokenizer) for name in ("alpaca", "plain")] == [ALPACA, PLAIN]
    with pytest.raises(ConfigError, match=r"template is chat, but .* brings no chat template: name a \.jinja file"):
        named_template("chat", tokenizer)
    tokenizer.chat_template = CHAT
    assert named_template("chat", tokenizer) == ChatTemplate(source=CHAT)
    (tmp_path / "t.json").write_text(
        json.dumps({"with_input": "{instruction}{input}", "without_input": "{instruction}"})
    )
    assert named_template(str(tmp_path / "t.json"), tokenizer) == PromptTemplate(
        with_input="{instruction}{input}", without_input="{instruction}"
    )
    (tmp_path / "t.jinja").write_text("{{ messages")
    with pytest.raises(AdapterError, match=r"t\.jinja: not a chat template in jinja2: line 1"):
        named_template(str(tmp_path / "t.jinja"), tokenizer)


def test_what_an_adapter_was_trained_in_is_used_and_other_templates_are_told(
    sources: dict[str, Source], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    saved = replace(ADAPTER, template=PLAIN, format_templates={"scienceqa": scienceqa.TEMPLATE})
    assert saved_template(None, tokenizer, None) == saved_template(None, tokenizer, ADAPTER) == ALPACA
    assert saved_template(None, tokenizer, saved) == PLAIN
    assert set(source_templates(sources.values(), tokenizer, saved)) == {PLAIN}
    assert set(source_templates([sources["text"]], tokenizer, ADAPTER)) == {PLAIN}, "of a file that states none"
    problems = replace(sources["alpaca"], format="scienceqa")
    assert source_templates([problems], tokenizer, saved) == [scienceqa.TEMPLATE]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert saved_template("alpaca", tokenizer, saved) == ALPACA
    assert "template=alpaca is not the template that the adapter was trained in" in caplog.text


def test_the_header_keeps_a_template_for_each_format(
    sources: dict[str, Source], caplog: pytest.LogCaptureFixture
) -> None:
    listed = [replace(sources["alpaca"], format=format) for format in ("alpaca", "scienceqa", "alpaca")]
    assert header_templates(listed, [ALPACA] * 3) == (ALPACA, {})
    assert header_templates(listed[:2], [ALPACA, scienceqa.TEMPLATE]) == (ALPACA, {"scienceqa": scienceqa.TEMPLATE})
    assert not caplog.records
    assert header_templates(listed, [ALPACA, scienceqa.TEMPLATE, PLAIN])[0] == ALPACA
    assert "is trained in another template than the sources of its format before it" in caplog.text
