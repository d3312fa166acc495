"""Requests to the engine, and its answers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from adapter.engine.sampling import TokenLogprob
from adapter.errors import AdapterError
from adapter.generation_config import GenerationConfig

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""A stop id or stop string came; the allowance or the window is used up; the request was cancelled; it failed."""


class QueueFullError(AdapterError):
    """The engine has as many waiting sequences as it takes: ask again later."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue, with the settings of its own."""

    prompt: Sequence[int]
    """Token ids, BOS included."""
    adapter: str | None = None
    """Name of a registered adapter; None for the model as it was given to the engine."""
    image: Tensor | None = None
    """Features (F,) of the prompt's image."""
    config: GenerationConfig = field(default_factory=GenerationConfig)
    """Temperature, top_p, seed, and the maximum number of tokens."""
    top_k: int = 0
    """Sample from at most this many of the likeliest tokens; 0 for no limit."""
    stop_ids: Collection[int] | None = None
    """Ids that end a continuation and are not part of it; None for the tokenizer's."""
    stop: Sequence[str] = ()
    """Strings that end a continuation; none of them is part of its text."""
    logprobs: int | None = None
    """Number of likeliest tokens to return with each chosen one; None for no log-probabilities."""
    prompt_logprobs: int | None = None
    """Number of likeliest tokens to return with each token of the prompt; None for no log-probabilities of it."""
    n: int = 1
    """Number of continuations."""
    repeat: int = 0
    """Number of equal prompts with the same seed that precede this one; each gets other random numbers."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise AdapterError(f"top_k must be 0 (no limit) or a positive number, got {self.top_k}")
        if self.n < 1 or self.repeat < 0:
            raise AdapterError(f"n must be at least 1 and repeat at least 0, got n={self.n}, repeat={self.repeat}")
        for name in ("logprobs", "prompt_logprobs"):
            if (number := getattr(self, name)) is not None and number < 0:
                raise AdapterError(f"{name} must be None or at least 0, got {number}")
        if isinstance(self.stop, str) or not all(isinstance(one, str) and one for one in self.stop):
            raise AdapterError(f"stop must be a list of strings that are not empty, got {self.stop!r:.60}")


@dataclass(frozen=True, kw_only=True)
class Event:
    """The part that a step adds to one continuation."""

    choice: int
    """Number of the continuation within its request, from 0."""
    ids: list[int]
    """The new token, or none."""
    text: str = ""
    """The text that became certain with it."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of `ids`, and one for the stop id that ended the continuation, if they were asked for."""
    finish: FinishReason | None = None
    """Why the continuation ended; None while it goes on."""


OnEvent = Callable[[Event], None]
"""Called by the thread that runs the engine, which waits meanwhile."""


@dataclass(kw_only=True)
class Choice:
    """A continuation, as far as it is known."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class Handle:
    """A request in the engine, and its continuations."""

    def __init__(self, request: Request, on_event: OnEvent | None = None) -> None:
        self.request = request
        self.choices = [Choice() for _ in range(request.n)]
        self.prompt_logprobs: list[TokenLogprob] = []
        """One for each token of the prompt but the first, given those before it, if they were asked for; complete
        with the first event."""
        self.error: Exception | None = None
        """Why the request failed."""
        self.cancelled = False
        self._on_event = on_event

    @property
    def done(self) -> bool:
        """All continuations have ended."""
        return all(choice.finish for choice in self.choices)

    def cancel(self) -> None:
        """Ask the engine to drop the request at its next step. May be called from any thread."""
        self.cancelled = True

    def add(self, event: Event) -> None:
        """Add what a step gave."""
        choice = self.choices[event.choice]
        choice.ids += event.ids
        choice.text += event.text
        choice.logprobs += event.logprobs
        choice.finish = event.finish
        if self._on_event is not None:
            self._on_event(event)
