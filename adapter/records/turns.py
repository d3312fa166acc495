"""Put conversations into a prompt template: the first turn in its text, later turns in its text for later turns.

BOS + system message + first prompt + answer + EOS + later prompt + answer + EOS …, of which answers and their EOS are
labelled. The system message and a blank line stand before the first prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adapter.errors import RecordError
from adapter.records.example import Example, Prompt, encode_answered, shorten_answer
from adapter.templates import PromptTemplate
from adapter.tokenizers.base import Tokenizer

Message = Mapping[str, Any]


class _Exchange(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str | None
    """None for the last question of a conversation that is to be answered."""
    labelled: bool


def encode_turns(
    messages: Sequence[Message], tokenizer: Tokenizer, template: PromptTemplate, max_length: int
) -> Example:
    """Encode an answered conversation; see `adapter.records.encoding.encode_record`."""
    system, exchanges = _exchanges(messages)
    if any(exchange.answer is None for exchange in exchanges):
        raise RecordError("the last question of the conversation has no answer")
    later = [_encode(exchange, template.render_later(exchange.question), tokenizer) for exchange in exchanges]
    following = [sum(len(prompt) + len(answer) for prompt, answer in later[k + 1 :]) for k in range(len(later))]
    for k, exchange in enumerate(exchanges):
        first = _encode(exchange, system + template.render(exchange.question), tokenizer, bos=True)
        if len(first[0]) + len(first[1]) + following[k] <= max_length:
            break
    prompt, answer = first
    answer = shorten_answer(answer, len(prompt), max_length - following[k], tokenizer)
    ids, spans = list[int](), []
    for (question, reply), exchange in zip([(prompt, answer), *later[k + 1 :]], exchanges[k:], strict=True):
        ids += question
        if exchange.labelled:
            spans.append((len(ids), len(ids) + len(reply)))
        ids += reply
    if not spans:
        raise RecordError("no answer that is left of the conversation is to be trained on")
    return Example(ids=ids, label_spans=spans, dropped_turns=2 * k)


def turns_prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: PromptTemplate, room: int) -> Prompt:
    """Encode a conversation that is to be answered; see `adapter.records.encoding.encode_prompt`."""
    system, exchanges = _exchanges(messages)
    if exchanges[-1].answer is not None:
        raise RecordError("the conversation has no question at its end that is to be answered")
    later = [_encode(exchange, template.render_later(exchange.question), tokenizer) for exchange in exchanges]
    for k, exchange in enumerate(exchanges):
        first = _encode(exchange, system + template.render(exchange.question), tokenizer, bos=True)
        ids = [id for prompt, answer in [first, *later[k + 1 :]] for id in (*prompt, *answer)]
        if len(ids) <= room:
            break
    return Prompt(ids=ids, dropped_turns=2 * k)


def _encode(exchange: _Exchange, text: str, tokenizer: Tokenizer, *, bos: bool = False) -> tuple[list[int], list[int]]:
    """The ids of the prompt's text, and of the answer with EOS; none of an answer that is still to come."""
    if exchange.answer is None:
        return tokenizer.encode(text, bos=bos, eos=False), []
    return encode_answered(text, exchange.answer, tokenizer, bos=bos)


def _exchanges(messages: Sequence[Message]) -> tuple[str, list[_Exchange]]:
    """The system message with a blank line after it, if there is one, and the questions with their answers.

    Raises RecordError for a conversation that does more than ask and answer in turn.
    """
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = f"{messages[0]['content']}\n\n", messages[1:]
    exchanges = list(_pairs(messages))
    if not exchanges:
        raise RecordError("the conversation has no question")
    return system, exchanges


def _pairs(messages: Sequence[Message]) -> Iterator[_Exchange]:
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected or message.get("tool_calls"):
            what = "a call of a tool" if message.get("tool_calls") else f"a turn of {message['role']!r}"
            raise RecordError(
                f"{what} in place of one of {expected!r}, for which a prompt template has no text: use the model's own "
                "chat template, by data.template=chat"
            )
        if expected == "assistant":
            question = messages[i - 1]["content"]
            yield _Exchange(question, message["content"], message.get("weight") != 0)
    if len(messages) % 2:
        yield _Exchange(messages[-1]["content"], None, False)
