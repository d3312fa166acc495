"""Errors as the OpenAI API gives them: {"error": {"message", "type", "param", "code"}}."""

import json
from typing import Any

from starlette.responses import Response

from adapter.engine.adapters import UnknownAdapterError
from adapter.engine.request import QueueFullError
from adapter.engine.worker import EngineStoppedError
from adapter.errors import AdapterError, CheckpointError
from cafo.errors import CafoError
from rayjobs.errors import StorageError, UserError

RETRY_AFTER_S = 1
"""Seconds after which a client that was told to come again should do so."""


class ApiError(UserError):
    """A request that cannot be answered, with the HTTP status and the names that clients go by."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """param: the key of the body that is wrong. code: a name of the error for programs."""
        super().__init__(message)
        self.status, self.param = status, param
        self.code = "invalid_value" if code is None and status == 400 else code

    def body(self) -> dict[str, Any]:
        """The error as JSON values."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class JsonResponse(Response):
    """Values as JSON in ASCII, so that no text, not even half of a surrogate pair, can fail to be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content).encode("ascii")


def dump_json(content: Any) -> str:
    """JSON in ASCII, on one line."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def error_response(error: ApiError) -> JsonResponse:
    """The HTTP response of an error."""
    headers: dict[str, str] = {}
    if error.status in (429, 503):
        headers = {"retry-after": str(RETRY_AFTER_S)}
    elif error.status == 401:
        headers = {"www-authenticate": "Bearer"}
    return JsonResponse(error.body(), status_code=error.status, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an ApiError. What is no user's error says nothing of the program's inside."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(str(error), status=429, code="queue_full")
        case UnknownAdapterError():
            return ApiError(str(error), status=404, param="model", code="model_not_found")
        case EngineStoppedError():
            return ApiError(str(error), status=503, code="engine_stopped")
        case CheckpointError() | StorageError():  # their messages name files of the server
            return ApiError("the model cannot be read; the server's log says why", status=503, code="model_not_loaded")
        case AdapterError() | CafoError() | UserError():
            return ApiError(str(error))
    return ApiError("the server failed on this request; its log says why", status=500, code="internal_error")
