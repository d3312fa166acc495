"""One continuation on its way through the engine."""

from collections.abc import Collection

import torch

from adapter.engine.request import Event, FinishReason, Handle
from adapter.engine.row_parts import AdapterParts
from adapter.engine.sampling import SamplingSettings, TokenLogprob, random_generator
from adapter.engine.text_stream import TextStream
from adapter.tokenizers.base import Tokenizer


class Sequence:
    """A prompt, and the tokens that were chosen for it."""

    def __init__(
        self,
        handle: Handle,
        choice: int,
        *,
        tokenizer: Tokenizer | None,
        stop_ids: Collection[int],
        seed: int,
        limit: int,
    ) -> None:
        """choice: its number within the request. limit: tokens that it may get."""
        request = handle.request
        self.handle, self.choice, self.stop_ids, self.limit = handle, choice, stop_ids, limit
        self.prompt, self.n_chosen, self.last = list(request.prompt), 0, -1
        self.held = 0
        """Tokens in the cache."""
        self.sampling = SamplingSettings(request.config.temperature, request.config.top_p, request.top_k)
        self.generator: torch.Generator | None = None
        if self.sampling.temperature:
            self.generator = random_generator(seed, self.prompt, request.repeat + choice)
        self._stream = None if tokenizer is None else TextStream(tokenizer, self.prompt, request.stop)
        self.parts: AdapterParts | None = None
        """The adapter's parts within the base's layers, once the sequence has a slot."""
        self.ended = False

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not in the cache yet."""
        return max(0, len(self.prompt) - self.held)

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take the chosen token, and tell the handle what is new."""
        self.last = token
        if token in self.stop_ids:
            self._tell("stop", [], "", [] if logprob is None else [logprob])
            return
        self.n_chosen += 1
        text = self._stream.push(token) if self._stream else ""
        finish: FinishReason | None = None
        if self._stream is not None and self._stream.stopped:
            finish = "stop"
        elif self.n_chosen >= self.limit:
            finish = "length"
        self._tell(finish, [token], text, [] if logprob is None else [logprob])

    def end(self, finish: FinishReason) -> None:
        """End the continuation without another token."""
        self._tell(finish, [], "", [])

    def _tell(self, finish: FinishReason | None, ids: list[int], text: str, logprobs: list[TokenLogprob]) -> None:
        if finish is not None:
            self.ended = True
            text += self._stream.finish() if self._stream else ""
        self.handle.add(Event(choice=self.choice, ids=ids, text=text, logprobs=logprobs, finish=finish))
