"""Conversations on the terminal, and records of conversations in a file: the answers are the library's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import adapter.generate
from adapter import AdaptedModel, AdaptionConfig, PromptTemplate
from adapter.records.encoding import encode_prompt
from adapter.templates import ALPACA, ChatTemplate, Template
from rayjobs.config import load
from rayjobs.errors import ConfigError
from rayjobs.inference.decoding import DecodingConfig
from rayjobs.inference.instruction_file import describe_error, read_instructions, set_aside, shown_answer
from rayjobs.inference.instructions import AnswerInstructions
from rayjobs.inference.terminal import converse
from rayjobs.jobs import adapter_generate

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}"
TEMPLATE = PromptTemplate(with_input="{instruction} {input}:", without_input="{instruction}:", later="; {instruction}:")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that are typed; then the input ends."""
    lines: list[str] = []

    def read(prompt: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    return lines


def test_each_line_is_the_next_turn_until_the_conversation_is_begun_again(
    typed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def answer(record: dict[str, Any]) -> str:
        asked.append(record["messages"])
        return f"answer {len(asked)}"

    typed += ["one", " two ", "too long", "half \ud83d", "three", "", "four", "/reset", "five", "/exit", "never"]
    answers = converse(answer, lambda record: "too long" * (record["messages"][-1]["content"] == "too long"))
    assert answers == [f"answer {i}" for i in range(1, 6)]
    assert asked[2] == turns("one", "answer 1", "two", "answer 2", "three")
    assert asked[3:] == [turns("four"), turns("five")]
    assert typed == ["never"]
    assert "not answered: too long" in caplog.text
    assert "half of a surrogate pair" in caplog.text


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of all prompts that a model continues."""
    seen: list[list[int]] = []

    def generate(model: Any, prompts: list[list[int]], *given: Any, **named: Any) -> list[list[int]]:
        seen.extend(prompts)
        return adapter.generate.generate(model, prompts, *given, **named)

    monkeypatch.setattr("adapter.model.generate", generate)
    return seen


def test_adapter_generate_converses_in_the_template_of_the_training(
    typed: list[str],
    prompts: list[list[int]],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AdaptedModel.from_pretrained(tiny_base)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    model.template = TEMPLATE
    model.save_adapter(tmp_path / "a.safetensors")
    base = [f"base.path={tiny_base}", "decoding.max_new_tokens=7", "decoding.temperature=0"]
    given = [*base, f"adapter={tmp_path / 'a.safetensors'}"]

    def run(*words: str) -> list[str]:
        prompts.clear()
        return adapter_generate.run(load(adapter_generate.Config, None, list(words)))["answers"]

    def ids(template: Template, *texts: str) -> list[int]:
        return encode_prompt({"messages": turns(*texts)}, model.tokenizer, template, window=1024).ids

    typed += ["the cat", "a dog"]
    first, second = run(*given, "chat=true")
    assert prompts == [ids(TEMPLATE, "the cat"), ids(TEMPLATE, "the cat", first, "a dog")]
    assert capsys.readouterr().out.splitlines()[-2:] == [first, second]
    run(*given, "instruction=the cat")
    assert prompts == [ids(TEMPLATE, "the cat")]
    assert not caplog.records
    run(*given, "instruction=the cat", "template=alpaca")
    assert prompts == [ids(ALPACA, "the cat")]
    assert "template=alpaca is not the template that the adapter was trained in" in caplog.text
    typed += ["the cat"]
    run(*base, "chat=true")
    assert prompts == [ids(ALPACA, "the cat")]
    own = shutil.copytree(tiny_base, tmp_path / "own")
    (own / "chat_template.jinja").write_text(CHAT)
    typed += ["the cat"]
    run(f"base.path={own}", *base[1:], "chat=true")
    assert prompts == [ids(ChatTemplate(source=CHAT), "the cat")]
    run(f"base.path={own}", *base[1:], "instruction=the cat")
    assert prompts == [ids(ALPACA, "the cat")], "only conversations stand in the base's own"
    for wrong in ("instruction=the cat", f"file={tmp_path / 'a.jsonl'}"):
        with pytest.raises(ConfigError, match="chat is on the terminal"):
            adapter_generate.check(load(adapter_generate.Config, None, [*given, "chat=true", wrong]))


def test_a_file_of_conversations_is_answered_in_the_template(
    prompts: list[list[int]], tiny_base: Path, tmp_path: Path
) -> None:
    model = AdaptedModel.from_pretrained(tiny_base)
    records = [
        {"messages": turns("the cat", "sat", "a dog"), "id": 5},
        {"instruction": "the cat", "input": "ran"},
        {"messages": [*turns("the cat"), {"role": "tool", "content": "5"}]},
        {"prompt": "the bird"},
        {"messages": turns("cat " * 2000)},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(set_aside(read_instructions(tmp_path / "a.jsonl"), TEMPLATE, model.tokenizer, 1024))
    assert [bool(row.error) for row in rows] == [False, False, True, False, True]
    assert rows[4].error.endswith("leaves no room for an answer in the base's window of 1024")
    good = [row for row in rows if not row.error]
    task = AnswerInstructions(TEMPLATE, DecodingConfig(max_new_tokens=7, temperature=0))
    answered = [row["answer"] for row in task(model, [row.record for row in good], [None] * 3)]
    texts = ["the cat:sat", "; a dog:"]
    begin, later = (
        model.tokenizer.encode(text, bos=bos, eos=bos) for text, bos in zip(texts, (True, False), strict=True)
    )
    others = [model.tokenizer.encode(text, bos=True, eos=False) for text in ("the cat ran:", "the bird")]
    assert prompts == [begin + later, *others]
    expected = model.generate_from_ids(prompts[:], max_new_tokens=7, temperature=0)
    assert answered == [text.strip() for text in expected]
    shown = [shown_answer(row, "x")["instruction"] for row in good]
    assert shown == ["a dog", "the cat", "the bird"]
    assert describe_error({"messages": turns("a", "b")}, TEMPLATE, model.tokenizer, 99).startswith(
        "the conversation has no"
    )
