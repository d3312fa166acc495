"""A language or image model behind an OpenAI-compatible HTTP endpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from cafo.openai_client import Endpoint, RateLimitedClient
from rayjobs.config import config
from rayjobs.errors import StorageError


@config
class EndpointConfig(Endpoint):
    """An OpenAI-compatible HTTP endpoint."""

    model: str
    """Name of the model at the endpoint."""
    base_url: str = ""
    """Address up to /v1; empty for OpenAI's own."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the API key; empty for a server that needs none."""
    requests_per_minute: float = Field(default=60.0, gt=0)
    """Maximum number of requests per minute; requests are spaced out evenly."""
    retries: int = Field(default=5, ge=0)
    """Retries of a request that is temporarily refused or times out, with growing pauses."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one reply, in seconds."""

    def open(self) -> Endpoint:
        """The endpoint, after a check that its client library and key are there; nothing is sent.

        Raises ValueError naming what is missing.
        """
        RateLimitedClient(self).acquire()
        return self

    def identity(self) -> dict[str, str]:
        """The settings that answers depend on; rate, retries and timeout are not among them."""
        return {"model": self.model, "base_url": self.base_url}


@contextmanager
def endpoint_errors(endpoint: EndpointConfig | None) -> Iterator[None]:
    """Turn the client's errors into StorageErrors that name the endpoint and say how to continue."""
    if endpoint is None:
        yield
        return
    import openai

    try:
        yield
    except openai.OpenAIError as error:
        where = endpoint.base_url or "OpenAI"
        raise StorageError(
            f"{endpoint.model} at {where}: {' '.join(str(error).split())}; finished answers are kept, the same command "
            "goes on from there"
        ) from error
