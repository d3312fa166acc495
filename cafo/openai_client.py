"""A client of an OpenAI-compatible HTTP endpoint that keeps to a request rate.

The requests are sent by the `openai` package, an optional extra, which also retries them.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cafo.errors import CafoError


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Address, model and limits of an OpenAI-compatible endpoint."""

    model: str
    """name of the model at the endpoint"""
    base_url: str = ""
    """address up to `/v1`; empty for OpenAI's own"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the key; empty for a server that needs none. The key itself is never stored."""
    requests_per_minute: float = 60.0
    retries: int = 5
    """retries of one request, with growing pauses, after refused connections, timeouts, 408, 409, 429 and 5xx"""
    timeout_s: float = 60.0
    """longest wait for one reply, in seconds"""


class RateLimitedClient:
    """The `openai` client of an endpoint, with requests spaced out to the endpoint's rate.

    Call `acquire` before every request and send the request through the client that it returns.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._next_request_s = 0.0

    def acquire(self) -> Any:
        """Wait until the rate allows one more request, then return the `openai` client.

        Raises:
            CafoError: the `openai` package is not installed, or the key's environment variable is not set.
        """
        client = self._client
        now = time.monotonic()
        time.sleep(max(0.0, self._next_request_s - now))
        self._next_request_s = max(now, self._next_request_s) + 60.0 / self.endpoint.requests_per_minute
        return client

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise CafoError(
                "asking an endpoint needs the optional `openai` package; install the `openai` extra"
            ) from error
        variable = self.endpoint.key_variable
        key = os.environ.get(variable, "") if variable else "none"
        if not key:
            raise CafoError(f"no key for {self.endpoint.model}: set the environment variable {variable}")
        return openai.OpenAI(
            api_key=key,
            base_url=self.endpoint.base_url or None,
            max_retries=self.endpoint.retries,
            timeout=self.endpoint.timeout_s,
        )
