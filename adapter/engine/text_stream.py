"""The text of a sequence while its tokens are still being chosen.

What is given out is never taken back: a character that takes several tokens is given out whole, and text that may be
the beginning of a stop string waits until it is clear. All pieces together are the text that the tokens have in the
end. (Some tokenizers read a whole run of bytes as unreadable where one byte of it is. What was readable when it came
stays given.)
"""

from collections.abc import Sequence

from adapter.tokenizers.base import Tokenizer

CONTEXT_TOKENS = 8
"""Tokens before the new ones that are decoded with them, because the first word of a text may lose its space."""
WINDOW_TOKENS = 32
"""New tokens that are decoded together, before the window moves on."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character that bytes are read as while they are no character yet."""


class TextStream:
    """Turns the tokens of one sequence into text, piece by piece, and ends it at a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """stop: strings, none of them empty. The one that is complete first ends the text, and is not part of it."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context: list[int] = list(prompt[-CONTEXT_TOKENS:])
        self._window: list[int] = []
        self._decoded = 0  # characters of the window's text that were taken out of it
        self._waiting = ""  # characters that may begin a stop string
        self.stopped = False
        """A stop string was found."""

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is now certain, which may be empty."""
        self._window.append(token)
        text = self._tokenizer.continuation(self._context, self._window)
        end = len(text)
        while end > self._decoded and text[end - 1] == REPLACEMENT:
            end -= 1
        piece, self._decoded = text[self._decoded : end], max(end, self._decoded)
        if len(self._window) >= WINDOW_TOKENS and end == len(text):
            self._context, self._window, self._decoded = self._window[-CONTEXT_TOKENS:], [], 0
        return self._release(piece)

    def finish(self) -> str:
        """Return the text that was held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._tokenizer.continuation(self._context, self._window)
        piece, self._decoded = self._release(text[self._decoded :]), len(text)
        waiting, self._waiting = self._waiting, ""
        return piece + waiting

    def _release(self, piece: str) -> str:
        """Return what of the waiting text and a new piece cannot belong to a stop string; cut at one that is found."""
        text = self._waiting + piece
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)[1]]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that begins a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
