"""Conversations in prompt templates, completions and plain texts, compared with sequences put together here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter.errors import RecordError
from adapter.records import scienceqa
from adapter.records.encoding import encode_prompt, encode_record, encode_text
from adapter.templates import ALPACA, PLAIN, PromptTemplate
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer

TEMPLATE = PromptTemplate(
    with_input="{instruction} {input} :", without_input="do {instruction} :", later="; {instruction} :"
)

ASKED = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


def conversation(*texts: str, system: str = "") -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    made = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *made] if system else made}


def parts(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    """The ids of prompts and answers in turn, the first after BOS, each answer in its prompt's context with EOS."""
    made: list[list[int]] = []
    for i in range(0, len(texts), 2):
        prompt = tokenizer.encode(texts[i], bos=i == 0, eos=False)
        made += [prompt, tokenizer.encode(texts[i] + texts[i + 1], bos=i == 0, eos=True)[len(prompt) :]]
    return made


def test_a_conversation_of_one_turn_is_an_instruction(tokenizer: Tokenizer) -> None:
    for template in (ALPACA, TEMPLATE, scienceqa.TEMPLATE):
        for limit in (512, 130, 120):
            record = {"instruction": "the cat", "output": "sat on the red hill " * 9}
            expected = encode_record(record, tokenizer, template, max_length=limit)
            example = encode_record(
                conversation(record["instruction"], record["output"]), tokenizer, template, max_length=limit
            )
            assert example == expected


def test_every_answer_and_its_eos_is_labelled(tokenizer: Tokenizer) -> None:
    record = conversation("the cat", "sat", "a {input} dog", "ran on", "the bird", "flew", system="big house")
    example = encode_record(record, tokenizer, TEMPLATE)
    texts = ("big house\n\ndo the cat :", "sat", "; a {input} dog :", "ran on", "; the bird :", "flew")
    expected = parts(tokenizer, *texts)
    assert example.ids == [id for part in expected for id in part]
    assert [example.ids[start:end] for start, end in example.label_spans] == expected[1::2]
    assert all(part[-1] == tokenizer.eos_id for part in expected[1::2])
    asked = {"messages": record["messages"][:-1]}
    prompt = encode_prompt(asked, tokenizer, TEMPLATE, window=999)
    assert prompt.ids == example.ids[: example.label_spans[-1][0]]
    silent = [{**message, "weight": 0} if i in (2, 6) else message for i, message in enumerate(record["messages"])]
    some = encode_record({"messages": silent}, tokenizer, TEMPLATE)
    assert (some.ids, some.label_spans) == (example.ids, example.label_spans[1:2])


def test_too_long_a_conversation_loses_its_oldest_turns_whole(tokenizer: Tokenizer) -> None:
    texts = ("the cat", "sat", "a dog", "ran on the hill", "the bird", "flew")
    wholes = [encode_record(conversation(*texts[k:], system="big"), tokenizer, TEMPLATE) for k in (0, 2, 4)]
    for limit in range(len(wholes[2].ids), len(wholes[0].ids) + 2):
        example = encode_record(conversation(*texts, system="big"), tokenizer, TEMPLATE, max_length=limit)
        k = next(k for k, whole in enumerate(wholes) if len(whole.ids) <= limit)
        assert example == replace(wholes[k], dropped_turns=2 * k)
        prompt = encode_prompt(
            conversation(*texts[:-1], system="big"), tokenizer, TEMPLATE, window=999, reserve=999 - limit
        )
        assert len(prompt.ids) <= limit
    cut = encode_record(conversation(*texts, system="big"), tokenizer, TEMPLATE, max_length=len(wholes[2].ids) - 1)
    assert cut.ids == [*wholes[2].ids[:-2], tokenizer.eos_id]
    with pytest.raises(RecordError, match="leaves no label within 9"):
        encode_record(conversation(*texts, system="big"), tokenizer, TEMPLATE, max_length=9)


def test_what_a_prompt_template_has_no_text_for_is_refused(tokenizer: Tokenizer) -> None:
    for turns, message in (
        ([ASKED, {"role": "tool", "content": "5"}], "a turn of 'tool' in place of"),
        ([{"role": "assistant", "content": "a"}], "a turn of 'assistant' in place of one of 'user'"),
        (
            [ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}],
            "call of a tool",
        ),
        ([{"role": "system", "content": "a"}], "the conversation has no question"),
        ([ASKED], "the last question of the conversation has no answer"),
        ([*conversation("a")["messages"], {"role": "assistant", "content": "b", "weight": 0}], "to be trained on"),
    ):
        with pytest.raises(RecordError, match=message):
            encode_record({"messages": turns}, tokenizer, TEMPLATE)


def test_a_completion_follows_its_prompt_as_it_stands(tokenizer: Tokenizer) -> None:
    record = {"prompt": "the cat {instruction}", "completion": " sat on the hill"}
    example = encode_record(record, tokenizer, ALPACA)
    assert example == encode_record({"instruction": record["prompt"], "output": record["completion"]}, tokenizer, PLAIN)
    assert encode_prompt(record, tokenizer, ALPACA, window=99).ids == example.ids[: example.label_spans[0][0]]
    answer = example.ids[slice(*example.label_spans[0])]
    short = encode_record({**record, "prompt": "a dog ran on " * 30 + record["prompt"]}, tokenizer, max_length=27)
    assert len(short.ids) == 27
    assert short.ids[0] == tokenizer.bos_id
    assert short.ids[slice(*short.label_spans[0])] == answer
    tail = example.ids[1 : example.label_spans[0][0]]
    assert short.ids[: short.label_spans[0][0]][-len(tail) + 1 :] == tail[1:], "the left of the prompt is lost"
    cut = encode_record(record, tokenizer, max_length=5)
    assert cut.ids == [tokenizer.bos_id, *answer[:3], tokenizer.eos_id]


def test_a_text_is_labelled_whole_and_cut_into_sequences(tokenizer: Tokenizer) -> None:
    text = "the cat sat on the red hill and ran"
    ids = tokenizer.encode(text, bos=True, eos=True)
    (whole,) = encode_text({"text": text}, tokenizer, max_length=len(ids))
    assert (whole.ids, whole.label_spans) == (ids, [(1, len(ids))])
    assert encode_record({"text": text}, tokenizer, ALPACA) == whole
    pieces = encode_text({"text": text}, tokenizer, max_length=5)
    assert [id for piece in pieces for id in piece.ids[1:]] == ids[1:]
    assert all(piece.ids[0] == tokenizer.bos_id and len(piece.ids) <= 5 for piece in pieces)
    assert [piece.label_spans for piece in pieces] == [[(1, len(piece.ids))] for piece in pieces]
    with pytest.raises(RecordError, match="the text is empty"):
        encode_record({"text": ""}, tokenizer)
