"""Log-probabilities of tokens in the shapes of the two text endpoints."""

from collections.abc import Sequence
from typing import Any

from adapter.engine.sampling import TokenLogprob
from adapter.engine.text_stream import CONTEXT_TOKENS, REPLACEMENT
from adapter.tokenizers.base import Tokenizer

LOWEST = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for."""


class TokenTexts:
    """The texts of a sequence's tokens, each as it follows those before it."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """before: the tokens that the sequence follows."""
        self._tokenizer, self._context = tokenizer, list(before[-CONTEXT_TOKENS:])
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The text of a token that may come next."""
        if token not in self._known:
            self._known[token] = self._tokenizer.continuation(self._context, [token])
        return self._known[token]

    def push(self, token: int) -> None:
        """Go on by one token."""
        self._context = [*self._context[1 - CONTEXT_TOKENS :], token]
        self._known.clear()  # a text depends on the context


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, token by token."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """before: the tokens before the first one that the choice's text has."""
        self._texts, self._offset = TokenTexts(tokenizer, before), 0

    def add(self, logprobs: Sequence[TokenLogprob | int]) -> dict[str, Any]:
        """The fields of further tokens; of a bare id, the first of a prompt, nothing is known."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in logprobs:
            token = one if isinstance(one, int) else one.id
            tokens.append(self._texts.text(token))
            if isinstance(one, int):
                values.append(None)
                tops.append(None)
            else:
                values.append(_finite(one.logprob))
                top: dict[str, float] = {}
                for id, logprob in [*one.top, (one.id, one.logprob)]:
                    top.setdefault(self._texts.text(id), _finite(logprob))  # likeliest first
                tops.append(top)
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
            self._texts.push(token)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class ChatLogprobs:
    """The `logprobs` of one choice of a conversation's answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """before: the tokens of the prompt."""
        self._texts = TokenTexts(tokenizer, before)

    def add(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """The entries of further tokens."""
        entries = []
        for one in logprobs:
            top = [self._entry(id, logprob) for id, logprob in one.top]
            entries.append({**self._entry(one.id, one.logprob), "top_logprobs": top})
            self._texts.push(one.id)
        return entries

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._texts.text(token)
        whole = REPLACEMENT not in text  # otherwise the bytes of a part of a character, which are not known
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
