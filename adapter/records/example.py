"""The sequences and prompts that records become, and the joining of a prompt and its answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapter.errors import RecordError
from adapter.tokenizers.base import Tokenizer

Record = Mapping[str, Any]
Span = tuple[int, int]
"""(first, one past the last) of a sequence."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence of token ids."""

    ids: list[int]
    label_spans: list[Span]
    """The ids that are labelled, in order: a span for each answer."""
    input: str = ""
    """The input of an instruction record, shortened if the sequence would have been too long."""
    dropped_turns: int = 0
    """Oldest turns that were left out, because the conversation is too long."""
    unlabelled_turns: int = 0
    """Answers without labels, because their place in the chat template's text is not certain."""

    @property
    def n_labels(self) -> int:
        """Number of labelled ids."""
        return count_labels(self.label_spans)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The ids that a model continues with an answer."""

    ids: list[int]
    dropped_turns: int = 0
    """Oldest turns that were left out, because the conversation is too long."""


def count_labels(label_spans: Iterable[Span]) -> int:
    """Number of ids in spans."""
    return sum(end - start for start, end in label_spans)


def encode_answered(text: str, output: str, tokenizer: Tokenizer, *, bos: bool = True) -> tuple[list[int], list[int]]:
    """The ids of a prompt's text, and those of output + EOS that follow them.

    Both are encoded together, as the official code does. Where a token would span the end of the prompt, the output is
    encoded alone, so that the prompt's ids are those that generation will see.
    """
    prompt = tokenizer.encode(text, bos=bos, eos=False)
    together = tokenizer.encode(text + output, bos=bos, eos=True)
    if together[: len(prompt)] == prompt:
        return prompt, together[len(prompt) :]
    return prompt, tokenizer.encode(output, bos=False, eos=True)


def shorten_answer(answer: list[int], prompt: int, max_length: int, tokenizer: Tokenizer) -> list[int]:
    """The answer, cut from its right if it and the `prompt` tokens before it are too many, with EOS.

    Raises RecordError if not even one token of it would be left before EOS.
    """
    room = max_length - prompt
    if len(answer) <= room:
        return answer
    if room < 2 or len(answer) < 2:
        raise RecordError(f"the prompt alone has {prompt} tokens, which leaves no label within {max_length}")
    return [*answer[: room - 1], tokenizer.eos_id]
