"""Instruction records, encoded so that labels are never lost."""

import json
import random
from pathlib import Path

import pytest

from adapter.errors import AdapterError, RecordError
from adapter.records.encoding import encode_record
from adapter.templates import ALPACA, PromptTemplate
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer

TEMPLATE = PromptTemplate(with_input="do {instruction} with {input} :", without_input="do {instruction} :")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


def record(output: str, input: str = "", instruction: str = "cat") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output, "image": ""}


def test_sequence_is_bos_prompt_output_eos_with_labels_on_output_and_eos(tokenizer: Tokenizer) -> None:
    example = encode_record(record("the red hill"), tokenizer, TEMPLATE)
    prompt = tokenizer.encode("do cat :", bos=True, eos=False)
    assert example.ids[: example.label_spans[0][0]] == prompt
    assert example.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.ids[example.label_spans[0][0] : -1]).strip() == "the red hill"


def test_a_piece_across_the_boundary_leaves_the_prompt_as_generation_sees_it(tokenizer: Tokenizer) -> None:
    glued = PromptTemplate(with_input="{instruction}{input}", without_input="{instruction}")
    example = encode_record(record("at on", instruction="the c"), tokenizer, glued)
    assert example.ids[: example.label_spans[0][0]] == tokenizer.encode("the c", bos=True, eos=False)
    assert example.label_spans[0][0] < len(example.ids)


def test_empty_output_labels_eos(tokenizer: Tokenizer) -> None:
    example = encode_record(record(""), tokenizer, TEMPLATE)
    assert example.ids[example.label_spans[0][0] :] == [tokenizer.eos_id]


def test_too_long_loses_the_left_of_the_input_and_keeps_the_answer(tokenizer: Tokenizer) -> None:
    words = [f"{word}" for word in random.Random(0).choices(["cat", "dog", "hill", "mat"], k=60)]
    whole = record("the red hill", input=" ".join(words))
    example = encode_record(whole, tokenizer, TEMPLATE, max_length=64)
    text = tokenizer.decode(example.ids[: example.label_spans[0][0]])
    assert len(example.ids) <= 64
    assert example.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.ids[example.label_spans[0][0] : -1]).strip() == "the red hill"
    assert text.startswith("do cat with")
    assert " ".join(words[-4:]) in text
    assert len(example.ids) > 48  # no more than needed was dropped


def test_too_long_an_answer_keeps_its_left_and_eos(tokenizer: Tokenizer) -> None:
    whole = encode_record(record("the red hill " * 20), tokenizer, TEMPLATE)
    cut = encode_record(record("the red hill " * 20), tokenizer, TEMPLATE, max_length=33)
    assert cut.ids == [*whole.ids[:32], tokenizer.eos_id]


def test_a_prompt_that_fills_the_window_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError, match="leaves no label within 16"):
        encode_record(record("the", instruction="hill " * 40), tokenizer, TEMPLATE, max_length=16)


def test_alpaca_templates() -> None:
    with_input = ALPACA.render("Add {input}.", "1 {instruction}")
    assert with_input.endswith("### Instruction:\nAdd {input}.\n\n### Input:\n1 {instruction}\n\n### Response:")
    assert "### Input:" not in ALPACA.render("Add.")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"with_input": "{instruction}|{input}", "without_input": "{instruction}|"}))
    assert PromptTemplate.read(path).render("a {x}", "b") == "a {x}|b"
    path.write_text(json.dumps({"with_input": "{instruction}", "without_input": "{instruction}"}))
    with pytest.raises(ValueError, match=r"t\.json: prompt template 'with_input' must contain \{input\}"):
        PromptTemplate.read(path)
    for content in (b"{}", b"[]", b'{"with_input": 5}', b'{"with_input": "caf\xe9"}', '{"with'.encode("utf-16"), b""):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match=r"t\.json: a prompt template is a JSON object in UTF-8 with"):
            PromptTemplate.read(path)
