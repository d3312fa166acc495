"""The JSON bodies of requests, checked before anything is done with them."""

import asyncio
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from rayjobs.serve.api_errors import ApiError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
}
"""Keys of OpenAI's that this server does not follow → the values that ask for nothing."""

MAX_TOP_LOGPROBS = 20
MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS = 4096, 4096, 1024
LARGE_BODY = 64 * 1024
"""Bytes of a body beyond which it is not parsed on the event loop."""
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""Every list fails at its first wrong element: an error for each of millions would take gigabytes."""
BodyType = TypeVar("BodyType", bound=BaseModel)


class StreamOptions(BaseModel):
    """Settings of a streamed answer."""

    include_usage: bool = False


class GenerationBody(BaseModel):
    """The keys that both text endpoints take."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_texts(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """A stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or ids."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if one else list(prompt)


class ImageUrl(BaseModel):
    """An image in a message."""

    url: str


class Part(BaseModel):
    """A part of a message: a text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]

    @property
    def text(self) -> str:
        """The text of all parts."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text or "" for part in self.content if part.type == "text")

    @property
    def images(self) -> list[str]:
        """The URLs of the images."""
        parts = [] if isinstance(self.content, str) else self.content
        return [part.image_url.url if part.image_url else "" for part in parts if part.type == "image_url"]


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)


class AdapterBody(BaseModel):
    """The body of the endpoints that load and unload an adapter, in vLLM's convention."""

    model_config = ConfigDict(strict=True)

    lora_name: str
    lora_path: str | None = None


async def read_body(kind: type[BodyType], request: Request) -> BodyType:
    """Parse the body of a request, a large one in a thread. Raises what `parse_body` raises."""
    body = await request.body()
    if len(body) > LARGE_BODY:
        return await asyncio.to_thread(parse_body, kind, body)
    return parse_body(kind, body)


def parse_body(kind: type[BodyType], body: bytes) -> BodyType:
    """Parse a body. Raises ApiError, naming the key, for what is no JSON, of another type, or asks for too much."""
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from error
    except (ValueError, RecursionError) as error:
        raise ApiError("the body is not JSON in UTF-8", code="invalid_json") from error
    for name, value in (parsed.model_extra or {}).items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise ApiError(f"{name} is not supported here: leave it out", param=name, code="unsupported_parameter")
    return parsed


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON in UTF-8: {first['msg']}", code="invalid_json")
    place = [str(part) for part in first["loc"] if not re.search(r"\[|^(str|int|float|bool)$", str(part))]
    if not place:
        return ApiError("the body must be a JSON object", code="invalid_type")
    key = place[0]
    where = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in place).lstrip(".")
    if first["type"] == "missing":
        return ApiError(f"{where} is required", param=key, code="missing_required_parameter")
    what = first["msg"].replace("Input should be", "must be", 1)
    if key == "prompt":
        where = "prompt"
        what = f"must be a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either"
    kind = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(f"{where} {what}", param=key, code=kind)
