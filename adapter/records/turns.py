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
_Ids = tuple[list[int], list[int]]
"""The ids of an exchange: of its prompt, and of its answer."""


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
    dropped, [(prompt, answer), *later] = _fit(system, exchanges, tokenizer, template, max_length)
    answer = shorten_answer(answer, len(prompt), max_length, tokenizer)  # only the last one can be too long
    ids, spans = list[int](), []
    for (question, reply), exchange in zip([(prompt, answer), *later], exchanges[dropped:], strict=True):
        ids += question
        if exchange.labelled:
            spans.append((len(ids), len(ids) + len(reply)))
        ids += reply
    if not spans:
        raise RecordError("no answer that is left of the conversation is to be trained on")
    return Example(ids=ids, label_spans=spans, dropped_turns=2 * dropped)


def turns_prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: PromptTemplate, room: int) -> Prompt:
    """Encode a conversation that is to be answered; see `adapter.records.encoding.encode_prompt`."""
    system, exchanges = _exchanges(messages)
    if exchanges[-1].answer is not None:
        raise RecordError("the conversation has no question at its end that is to be answered")
    dropped, left = _fit(system, exchanges, tokenizer, template, room)
    return Prompt(ids=[id for prompt, answer in left for id in (*prompt, *answer)], dropped_turns=2 * dropped)


def _fit(
    system: str, exchanges: Sequence[_Exchange], tokenizer: Tokenizer, template: PromptTemplate, room: int
) -> tuple[int, list[_Ids]]:
    """The number of oldest exchanges that a conversation must lose, and the ids of the others; the last one stays."""
    later = [_encode(exchange, template.render_later(exchange.question), tokenizer) for exchange in exchanges]
    for dropped, exchange in enumerate(exchanges):
        first = _encode(exchange, system + template.render(exchange.question), tokenizer, bos=True)
        left = [first, *later[dropped + 1 :]]
        if sum(len(prompt) + len(answer) for prompt, answer in left) <= room:
            break
    return dropped, left


def _encode(exchange: _Exchange, text: str, tokenizer: Tokenizer, *, bos: bool = False) -> _Ids:
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
