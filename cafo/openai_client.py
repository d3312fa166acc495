"""An OpenAI-compatible HTTP endpoint: which one, how patiently, how often. The client is `openai`, an optional
extra."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cafo.errors import CafoError


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask.

    Raises:
        ValueError: at the first request, where the client or the key is missing.
    """

    model: str
    base_url: str = ""
    """empty: OpenAI's own"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the key; empty for a server that asks for none. The key itself is never
    stored."""
    requests_per_minute: float = 60.0
    retries: int = 5
    """of one request, with growing pauses, on refused connections, timeouts, 408, 409, 429 and 5xx"""
    timeout_s: float = 60.0


class RateLimitedClient:
    """A client that keeps to the endpoint's rate: `line.client()` waits its turn, then hands out the client."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._next_s = 0.0

    def acquire(self) -> Any:
        """The `openai` client, as soon as one more request is within the rate."""
        client = self._client
        now = time.monotonic()
        time.sleep(max(0.0, self._next_s - now))
        self._next_s = max(now, self._next_s) + 60.0 / self.endpoint.requests_per_minute
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
