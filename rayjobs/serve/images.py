"""POST /v1/images/classifications: an image's likeliest classes by a saved classifier, and what decided.

A request is JSON, or a form as browsers send it:

    {"model": "pets", "image": "data:image/png;base64,…", "top": 3}
    curl -F model=pets -F image=@cat.jpg localhost:8000/v1/images/classifications

The answer:

    {"object": "image.classification", "model": "pets", "data": [{"label": "cat", "probability": 0.97}, …],
     "margin": 0.95, "calibrated": true, "evidence": {"label": "cat", "rival": "lynx", "difference": 4.1, "text": 1.2,
     "images": [{"name": "cat/7.jpg", "label": "cat", "weight": 2.2}, …], "other_images": 0.7}}

`text`, the weights of `images` and `other_images` add up to `difference`, that of the logits of `label` and `rival`.
GET gives the list of the classifiers.
"""

from __future__ import annotations

import asyncio
import json
from email import message_from_bytes
from email.message import Message
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rayjobs.serve.api_errors import ApiError, JsonResponse
from rayjobs.serve.bodies import parse_body
from rayjobs.serve.classification import Asked, ClassificationWorker
from rayjobs.serve.image_input import ImageLimits, decode_bytes, decode_text

PATH = "/v1/images/classifications"

_AT_ONCE = 4
"""Images that are decoded at a time: each takes a few bytes for every pixel."""

_MAX_PARTS, _MAX_TEXT = 8, 4096
"""Parts of a form; bytes of the content type, of a part's headers, and of a part other than the image."""


class ClassificationBody(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    model: str = Field(max_length=512)
    image: str
    top: int = Field(default=5, ge=1, le=1000)
    evidence: int = Field(default=5, ge=0, le=100)
    coverage: float | None = Field(default=None, gt=0, lt=1)


class ImageRoutes:
    """The endpoint of a worker's classifiers."""

    def __init__(self, worker: ClassificationWorker, limits: ImageLimits | None = None) -> None:
        self.worker, self.limits = worker, limits or ImageLimits()
        self._decoding = asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> list[Route]:
        """Return the routes to mount. What they refuse is raised as ApiError."""
        return [Route(PATH, self.classify, methods=["POST"]), Route(PATH, self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """List the classifiers by name."""
        names = await asyncio.to_thread(self.worker.classifiers.paths)
        models = [{"id": name, "object": "model", "owned_by": "rayjobs"} for name in names]
        return JsonResponse({"object": "list", "data": models})

    async def classify(self, request: Request) -> Response:
        """Classify the image of a request."""
        content_type, body = request.headers.get("content-type", ""), await request.body()
        fields, image = await asyncio.to_thread(read_request, content_type, body)
        asked = Asked(top=fields.top, evidence=fields.evidence, coverage=fields.coverage)
        async with self._decoding:
            future = await asyncio.to_thread(self._submit, fields.model, image, asked)
        answer = await asyncio.wrap_future(future)
        return JsonResponse({"object": "image.classification", "model": fields.model, **answer})

    def _submit(self, name: str, image: str | bytes, asked: Asked) -> Any:
        decoded = decode_text(image, self.limits) if isinstance(image, str) else decode_bytes(image, self.limits)
        return self.worker.submit(name, decoded, asked)


def read_request(content_type: str, body: bytes) -> tuple[ClassificationBody, str | bytes]:
    """Return a request's fields, and its image: as text from JSON, as bytes from a form.

    Raises ApiError for a body that is neither, or lacks a field, or has one of the wrong type or of an unknown name.
    """
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        fields = _parse_fields(body)
        return fields, fields.image
    form = _read_form(content_type, body)
    image = form.pop("image", b"")
    texts = {name: content.decode(errors="replace") for name, content in form.items()}
    return _parse_fields(json.dumps({**texts, "image": "in the form"}).encode()), image


def _parse_fields(body: bytes) -> ClassificationBody:
    fields = parse_body(ClassificationBody, body)
    for name in fields.model_extra or {}:
        raise ApiError(f"{name!r:.80} is no key of this request: leave it out", param=name[:80], code="unknown_key")
    return fields


def _read_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the contents of a form by name."""
    given = Message()
    given["content-type"] = content_type[:_MAX_TEXT]
    try:
        boundary = (given.get_boundary() or "").encode("latin-1")
    except (ValueError, LookupError):
        boundary = b""
    if not boundary:
        raise ApiError("the content type of a form must name its boundary")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary, _MAX_PARTS + 1)
    if not parts or not parts.pop().startswith(b"--"):
        raise ApiError(f"a form has at most {_MAX_PARTS} parts, and ends with its boundary")
    fields: dict[str, bytes] = {}
    for part in parts:
        name, content = _read_part(part)
        if name in fields:
            raise ApiError(f"the form has two parts named {name!r:.80}")
        if name != "image" and len(content) > _MAX_TEXT:
            raise ApiError(f"the part {name!r:.80} of the form is larger than {_MAX_TEXT} bytes", param=name[:80])
        fields[name] = content
    return fields


def _read_part(part: bytes) -> tuple[str, bytes]:
    """Return the name and the content of what stands between two boundaries. What it contains is not read as a form."""
    head, blank, content = part.partition(b"\r\n\r\n")
    name = None
    if blank and head.startswith(b"\r\n") and len(head) <= _MAX_TEXT:
        name = message_from_bytes(head[2:]).get_param("name", header="content-disposition")
    if not name or not isinstance(name, str):
        raise ApiError("each part of a form must have headers, with its name")
    return name, content
