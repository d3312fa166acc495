"""A language or image model behind an OpenAI-compatible HTTP endpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from cafo.openai_client import Endpoint, RateLimitedClient
from rayjobs.config import config


@config
class EndpointConfig:
    """An OpenAI-compatible HTTP endpoint."""

    model: str
    """The model's name there."""
    base_url: str = ""
    """Its address up to /v1; empty is OpenAI's own."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; empty for a server that asks for none."""
    requests_per_minute: float = Field(default=60.0, gt=0)
    """Requests are spaced out to this rate."""
    retries: int = Field(default=5, ge=0)
    """Of one request that is refused for the moment or times out, with growing pauses."""
    timeout_s: float = Field(default=60.0, gt=0)
    """The longest wait for one reply."""

    def open(self) -> Endpoint:
        """The endpoint, with its client and key proven to be there. Raises ValueError naming what is not."""
        endpoint = Endpoint(
            model=self.model,
            base_url=self.base_url,
            key_variable=self.key_variable,
            requests_per_minute=self.requests_per_minute,
            retries=self.retries,
            timeout_s=self.timeout_s,
        )
        RateLimitedClient(endpoint).acquire()  # builds the client and sends nothing
        return endpoint

    def identity(self) -> dict[str, str]:
        """What its answers depend on; how patiently it is asked is not part of it."""
        return {"model": self.model, "base_url": self.base_url}


@contextmanager
def endpoint_errors(endpoint: EndpointConfig | None) -> Iterator[None]:
    """Turns the client's errors into OSErrors that say which endpoint refused and that what is done is kept."""
    if endpoint is None:
        yield
        return
    import openai

    try:
        yield
    except openai.OpenAIError as error:
        where = endpoint.base_url or "OpenAI"
        raise OSError(
            f"{endpoint.model} at {where}: {' '.join(str(error).split())}; what is done is kept, the same command goes "
            "on from there"
        ) from error
