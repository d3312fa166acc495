"""POST /v1/completions: texts that continue prompts."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapter.engine.sampling import TokenLogprob
from rayjobs.serve.api_errors import JsonResponse
from rayjobs.serve.bodies import CompletionBody, read_body
from rayjobs.serve.generation import Generation
from rayjobs.serve.logprobs import CompletionLogprobs
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.streams import EventStream, usage
from rayjobs.serve.text_model import Asked, TextModel


class Completions:
    """The endpoint of completions."""

    def __init__(self, model: TextModel, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics

    async def answer(self, request: Request) -> Response:
        """Answer a request. Raises ApiError or AdapterError for one that cannot be answered."""
        body = await read_body(CompletionBody, request)
        asked = await asyncio.to_thread(self._model.ask_completion, body)
        answer = _Answer(self._model, body, asked)
        if body.stream:
            return EventStream(self._stream(answer))
        async with Generation(self._model.worker, self._metrics, asked.requests) as generation:
            handles = await generation.finish()
        values = await asyncio.to_thread(answer.whole, handles)
        return JsonResponse(values)

    async def _stream(self, answer: "_Answer") -> AsyncIterator[dict[str, Any]]:
        async with Generation(self._model.worker, self._metrics, answer.asked.requests) as generation:
            async for number, event in generation:
                if not answer.begun(number, event.choice):
                    known = generation.handles[number].prompt_logprobs
                    echo, logprobs = await asyncio.to_thread(answer.begin, number, event.choice, known)
                    if answer.body.echo:
                        yield answer.chunk(number, event.choice, echo, logprobs, None)
                further = (number, event.choice, event.text, event.logprobs)
                if event.logprobs:
                    text, logprobs = await asyncio.to_thread(answer.go_on, *further)
                else:
                    text, logprobs = answer.go_on(*further)
                if text or logprobs or event.finish:
                    yield answer.chunk(number, event.choice, text, logprobs, event.finish)
            if answer.body.includes_usage:
                counted = usage(answer.asked.requests, generation.handles, hidden=answer.hides)
                yield {**answer.head, "choices": [], "usage": counted}


class _Answer:
    """The answer to a completion, as a whole or in chunks."""

    def __init__(self, model: TextModel, body: CompletionBody, asked: Asked) -> None:
        self._model, self.body, self.asked = model, body, asked
        self.hides = body.max_tokens == 0
        """Only the prompt is wanted: the engine's one token is not shown."""
        self._logprobs: dict[tuple[int, int], CompletionLogprobs] = {}
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def begun(self, number: int, choice: int) -> bool:
        """A continuation of a prompt has been begun."""
        return (number, choice) in self._logprobs

    def begin(self, number: int, choice: int, prompt_logprobs: list[TokenLogprob]) -> tuple[str, dict[str, Any] | None]:
        """The text of the prompt with its log-probabilities, if they are wanted; an empty text without an echo."""
        tokenizer, prompt = self._model.tokenizer, self.asked.requests[number].prompt
        echo = ""
        if self.body.echo:
            given = self.asked.texts[number]
            echo = tokenizer.decode(prompt) if given is None else given
        logprobs = CompletionLogprobs(tokenizer, () if self.body.echo else prompt)
        self._logprobs[number, choice] = logprobs
        wanted = self.body.echo and self.body.logprobs is not None
        return echo, logprobs.add([prompt[0], *prompt_logprobs]) if wanted else None

    def go_on(
        self, number: int, choice: int, text: str, logprobs: list[TokenLogprob]
    ) -> tuple[str, dict[str, Any] | None]:
        """New text of a continuation with its log-probabilities, if they are wanted."""
        if self.hides:
            return "", None
        return text, self._logprobs[number, choice].add(logprobs) if logprobs else None

    def whole(self, handles: list[Any]) -> dict[str, Any]:
        """The answer that is sent at once."""
        choices = []
        for number, handle in enumerate(handles):
            for index, choice in enumerate(handle.choices):
                echo, first = self.begin(number, index, handle.prompt_logprobs)
                text, rest = self.go_on(number, index, choice.text, choice.logprobs)
                parts = [part for part in (first, rest) if part]
                logprobs = {key: [one for part in parts for one in part[key]] for key in parts[0]} if parts else None
                choices.append(self._choice(number, index, echo + text, logprobs, choice.finish))
        return {**self.head, "choices": choices, "usage": usage(self.asked.requests, handles, hidden=self.hides)}

    def chunk(
        self, number: int, choice: int, text: str, logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        """A chunk of a stream."""
        values = {**self.head, "choices": [self._choice(number, choice, text, logprobs, finish)]}
        return {**values, "usage": None} if self.body.includes_usage else values

    def _choice(
        self, number: int, choice: int, text: str, logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        index = number * (self.body.n or 1) + choice
        finish = "length" if finish and self.hides else finish
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
