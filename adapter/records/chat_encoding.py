"""Put records into a model's chat template, and find the tokens of the assistant's turns in it.

A conversation is rendered once and its text tokenized once. The assistant's characters are those of the template's
`generation` blocks. A template without such blocks is asked what it writes up to an answer, and with the answer: where
the one is the beginning of the other, and this the beginning of the whole, the difference is the answer with the token
that ends its turn. Where it is not, such as in templates that show the thoughts of the last answer alone, the answer
keeps its tokens and gets no labels.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapter.errors import RecordError
from adapter.records.example import Example, Prompt, Record, Span
from adapter.templates import ChatTemplate
from adapter.tokenizers.base import Rendered, Tokenizer

if TYPE_CHECKING:
    from adapter.chat_renderer import Rendering

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class _Layout:
    """A chat template with what it needs to render and tokenize conversations."""

    template: ChatTemplate
    tokenizer: Tokenizer
    tools: Tools
    _special: dict[str, bool] = field(default_factory=dict)
    """The messages' texts, and whether they spell a special token."""

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return the text that the template writes. prompt: with the header of the answer that is to come."""
        return self._render(messages, prompt, find=None).text

    def tokens(self, messages: Sequence[Message], *, prompt: bool = False) -> "_Tokens":
        """The conversation, rendered and tokenized. What a message holds is never a special token."""
        rendering = self._render(messages, prompt, find=self._spells_special)
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in rendering.text:
            raise RecordError("the chat template leaves out the system message: remove it, or use another template")
        rendered = self.tokenizer.encode_rendered(rendering.text, rendering.given)
        return _Tokens(rendering.text, rendering.generated, rendered)

    def _render(self, messages: Sequence[Message], prompt: bool, find: Callable[[str], bool] | None) -> "Rendering":
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        special = self.tokenizer.special_tokens
        return self.template.render(
            plain, special_tokens=special, tools=self.tools, add_generation_prompt=prompt, find=find
        )

    def _spells_special(self, text: str) -> bool:
        if text not in self._special:
            self._special[text] = _spells_special(text, self.tokenizer)
        return self._special[text]


@dataclass(frozen=True)
class _Tokens:
    """A rendered and tokenized conversation."""

    text: str
    generated: list[Span]
    """Characters of `generation` blocks."""
    rendered: Rendered

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.rendered.ids

    def within(self, start: int, end: int) -> Span:
        """The tokens of the characters from start to end. A token that begins before them is none of them."""
        spans = self.rendered.spans
        first = bisect_left(spans, start, key=lambda span: span[0])
        return first, max(first, bisect_left(spans, end, key=lambda span: span[0]))


def encode_chat(
    messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer, template: ChatTemplate, max_length: int
) -> Example:
    """Encode an answered conversation; see `adapter.records.encoding.encode_record`."""
    if messages[-1]["role"] != "assistant":
        raise RecordError("the last turn of the conversation is not the assistant's")
    layout, end = _Layout(template, tokenizer, tools), end_of_turn(template, tokenizer)
    room = max_length - (end is None)  # a template without an end of turns gets EOS
    messages, tokens, dropped = _fit(layout, messages, room)
    if len(tokens.ids) > room:
        messages, tokens = _shorten(layout, messages, tokens, room)
    ids, spans = _label(layout, messages, tokens, end)
    labelled = [span for span in spans if span[0] < span[1]]
    if not labelled:
        raise RecordError(
            "no answer has a certain place in the chat template's text, which changes before an answer when the answer "
            "is there: use a template with generation blocks, or another one"
        )
    return Example(ids=ids, label_spans=labelled, dropped_turns=dropped, unlabelled_turns=len(spans) - len(labelled))


def encode_chat_instruction(record: Record, tokenizer: Tokenizer, template: ChatTemplate, max_length: int) -> Example:
    """Encode an instruction record as a conversation of two turns; its input loses its left if it is too long."""
    layout, input = _Layout(template, tokenizer, None), record.get("input") or ""
    room = max_length - (end_of_turn(template, tokenizer) is None)
    pieces = tokenizer.encode(input, bos=False, eos=False) if input else []
    while True:
        answer = {"role": "assistant", "content": record["output"]}
        messages = [instruction_message({**record, "input": input}), answer]
        if not pieces or (excess := len(layout.tokens(messages).ids) - room) <= 0:
            return replace(encode_chat(messages, None, tokenizer, template, max_length), input=input)
        pieces = pieces[excess:]
        input = tokenizer.decode(pieces)


def chat_prompt(
    messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer, template: ChatTemplate, room: int
) -> Prompt:
    """Encode a conversation that is to be answered; see `adapter.records.encoding.encode_prompt`."""
    _, tokens, dropped = _fit(_Layout(template, tokenizer, tools), messages, room, prompt=True)
    return Prompt(ids=tokens.ids, dropped_turns=dropped)


def instruction_message(record: Record) -> dict[str, str]:
    """An instruction as a user's turn: with its input, if there is one, after a blank line."""
    content = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
    return {"role": "user", "content": content}


@lru_cache(maxsize=16)
def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token by which the template ends an answer; None if there is none.

    It need not be the tokenizer's EOS: a model that was not tuned on conversations knows another end, but what is
    trained on this template ends its answers so.
    """
    layout = _Layout(template, tokenizer, None)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        tokens = layout.tokens(messages)
        place = _answer_characters(layout, messages, 1, tokens.text)
    except RecordError:
        return None
    if place is None:
        return None
    last = tokens.within(*place)[1] - 1
    start, end = tokens.rendered.spans[last]
    own = start > tokens.text.rindex("2", *place) and _spells_special(tokens.text[start:end], tokenizer)
    return tokens.ids[last] if own else None


def stop_ids(template: object, tokenizer: Tokenizer) -> frozenset[int]:
    """All ids that end an answer: the tokenizer's, and the template's end of a turn."""
    end = end_of_turn(template, tokenizer) if isinstance(template, ChatTemplate) else None
    return tokenizer.eos_ids | ({end} if end is not None else set())


def _fit(
    layout: _Layout, messages: Sequence[Message], room: int, *, prompt: bool = False
) -> tuple[Sequence[Message], _Tokens, int]:
    """The conversation without as many of its oldest turns as it must lose, its tokens, and how many turns it lost.

    A question is dropped with all turns up to the next question. The system message and the last question stay.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    starts = [len(system), *questions[1:]]

    def shortened(k: int) -> tuple[Sequence[Message], _Tokens, int]:
        left = [*system, *messages[starts[k] :]]
        return left, layout.tokens(left, prompt=prompt), starts[k] - len(system)

    whole = shortened(0)
    if len(whole[1].ids) <= room or len(starts) == 1:
        return whole
    fits = bisect_left(range(1, len(starts) - 1), True, key=lambda k: len(shortened(k)[1].ids) <= room)
    return shortened(1 + fits)


def _shorten(
    layout: _Layout, messages: Sequence[Message], tokens: _Tokens, room: int
) -> tuple[Sequence[Message], _Tokens]:
    """The conversation with an end of its last answer cut off, so that it fits.

    Raises RecordError if nothing would be left of the answer.
    """
    *before, answer = messages
    pieces = layout.tokenizer.encode(answer["content"], bos=False, eos=False)
    while (excess := len(tokens.ids) - room) > 0:
        alone = len(tokens.ids) - len(pieces)
        pieces = pieces[: max(0, len(pieces) - excess)]
        text = layout.tokenizer.decode(pieces).rstrip("\ufffd")  # a character that was cut in two
        if not text:
            raise RecordError(f"the turns before the answer have {alone} tokens, which leaves no label within {room}")
        messages = [*before, {**answer, "content": text}]
        tokens = layout.tokens(messages)
    return messages, tokens


def _label(
    layout: _Layout, messages: Sequence[Message], tokens: _Tokens, end: int | None
) -> tuple[list[int], list[Span]]:
    """The ids of the sequence, and the labelled ones of each answer that is to be trained on; an empty span if its
    place is not certain."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [messages[i].get("weight") != 0 for i in answers]
    if tokens.generated:
        spans = [tokens.within(*place) for place in tokens.generated]
        if not all(trained):
            if len(spans) != len(answers):
                raise RecordError("turns of weight 0 cannot be told apart in this chat template")
            spans = [span for span, wanted in zip(spans, trained, strict=True) if wanted]
        return tokens.ids, spans
    places = [_answer_characters(layout, messages, i, tokens.text) for i in answers]
    stops, ids = layout.tokenizer.eos_ids, tokens.ids
    spans = [_with_stop(ids, tokens.within(*place), stops) if place else (0, 0) for place in places]
    if end is None and spans[-1][1] and ids[spans[-1][1] - 1] not in stops:
        ids = [*ids[: spans[-1][1]], layout.tokenizer.eos_id]
        spans[-1] = (spans[-1][0], len(ids))
    return ids, [span for span, wanted in zip(spans, trained, strict=True) if wanted]


def _with_stop(ids: Sequence[int], span: Span, stops: frozenset[int]) -> Span:
    """The span, with the token after it if that ends the answer, such as the marker of the next turn."""
    start, end = span
    ended = start < end and ids[end - 1] in stops
    return (start, end + 1) if not ended and end < len(ids) and ids[end] in stops else span


def _answer_characters(layout: _Layout, messages: Sequence[Message], i: int, whole: str) -> Span | None:
    """The characters of answer i and the end of its turn, without white space after it; None if they are not certain.

    They are certain if what the template writes up to the answer is the beginning of what it writes with the answer,
    and this is the beginning of the whole.
    """
    try:
        before, after = layout.text(messages[:i], prompt=True), layout.text(messages[: i + 1])
    except RecordError:
        return None
    place = len(before), len(after.rstrip())
    return place if after.startswith(before) and whole.startswith(after) and place[0] < place[1] else None


def _spells_special(text: str, tokenizer: Tokenizer) -> bool:
    """True if a text, within a rendering, would hold special tokens."""
    return tokenizer.encode_rendered(text).ids != tokenizer.encode_rendered(text, [(0, len(text))]).ids
