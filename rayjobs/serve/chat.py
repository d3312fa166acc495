"""POST /v1/chat/completions: answers to conversations."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapter.engine.request import Handle
from rayjobs.serve.api_errors import JsonResponse
from rayjobs.serve.bodies import ChatBody, read_body
from rayjobs.serve.generation import Generation
from rayjobs.serve.logprobs import ChatLogprobs
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.streams import EventStream, usage
from rayjobs.serve.text_model import Asked, TextModel


class ChatCompletions:
    """The endpoint of conversations."""

    def __init__(self, model: TextModel, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics

    async def answer(self, request: Request) -> Response:
        """Answer a request. Raises ApiError or AdapterError for one that cannot be answered."""
        body = await read_body(ChatBody, request)
        asked = await asyncio.to_thread(self._model.ask_chat, body)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            return EventStream(self._stream(body, asked, {**head, "object": "chat.completion.chunk"}))
        async with Generation(self._model.worker, self._metrics, asked.requests) as generation:
            (handle,) = await generation.finish()
        choices = await asyncio.to_thread(self._choices, body, handle)
        values = {**head, "object": "chat.completion", "choices": choices, "usage": usage(asked.requests, [handle])}
        return JsonResponse(values)

    def _choices(self, body: ChatBody, handle: Handle) -> list[dict[str, Any]]:
        choices = []
        for index, choice in enumerate(handle.choices):
            logprobs = None
            if body.logprobs:
                entries = ChatLogprobs(self._model.tokenizer, handle.request.prompt)
                logprobs = {"content": entries.add(choice.logprobs[: len(choice.ids)]), "refusal": None}
            message = {"role": "assistant", "content": choice.text.strip(), "refusal": None}
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish})
        return choices

    async def _stream(self, body: ChatBody, asked: Asked, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        (request,) = asked.requests
        stripped = [StrippedText() for _ in range(request.n)]
        entries = [ChatLogprobs(self._model.tokenizer, request.prompt) for _ in range(request.n)]
        begun: set[int] = set()

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            values = {**head, "choices": [choice]}
            return {**values, "usage": None} if body.includes_usage else values

        async with Generation(self._model.worker, self._metrics, asked.requests) as generation:
            async for _, event in generation:
                index = event.choice
                if index not in begun:
                    begun.add(index)
                    yield chunk(index, {"role": "assistant", "content": ""})
                text = stripped[index].push(event.text)
                logprobs = None
                if body.logprobs and event.ids:
                    content = await asyncio.to_thread(entries[index].add, event.logprobs)
                    logprobs = {"content": content, "refusal": None}
                if text or logprobs:
                    yield chunk(index, {"content": text}, logprobs)
                if event.finish:
                    yield chunk(index, {}, finish=event.finish)
            if body.includes_usage:
                yield {**head, "choices": [], "usage": usage(asked.requests, generation.handles)}


class StrippedText:
    """A text without the white space around it, while it comes: white space waits until something follows it."""

    def __init__(self) -> None:
        self._began, self._waiting = False, ""

    def push(self, piece: str) -> str:
        """Add a piece. Returns the text that can be shown."""
        text = self._waiting + piece
        if not self._began:
            text = text.lstrip()
        shown = text.rstrip()
        self._waiting = text[len(shown) :]
        self._began = self._began or bool(shown)
        return shown
