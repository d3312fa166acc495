"""Errors of a request to the server, in the form in which OpenAI's API gives them."""

from collections.abc import Mapping
from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""The type of an error by status; of other statuses below 500 `invalid_request_error`, of the rest `server_error`."""


class ApiError(Exception):
    """A request that is refused: with a status, a message that says what to change, and the parameter to change."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """status: HTTP status, 400 to 599. headers: of the answer, such as Retry-After."""
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the answer's body: {"error": {message, type, param, code}}."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = TYPES.get(self.status, default)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
