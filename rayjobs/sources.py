"""What the first two steps of CaFo ask and of whom: the classes, a served model, and one source per folder of
answers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from pydantic import Field

from cafo.datasets import PHOTO
from cafo.endpoint import Endpoint, Line
from cafo.prompt import spoken
from rayjobs.config import config
from rayjobs.imagery import ImagesConfig


class Classes(NamedTuple):
    """What is described and drawn."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """sentences with one {} for the class name"""

    def missing(self, known: Mapping[str, Any]) -> list[str]:
        """The names, each once, that are in `known` neither with underscores nor with spaces."""
        answered = {spoken(name) for name, answers in known.items() if answers}
        return [name for name in dict.fromkeys(self.names) if spoken(name) not in answered]


def open_classes(data: ImagesConfig | None, class_names: list[str] | None) -> Classes:
    """A data set's classes, or a plain list. Raises ValueError unless there is exactly one of them."""
    if (data is None) == (class_names is None):
        raise ValueError("give the classes: either data (a data set) or class_names (a plain list), one of the two")
    if data is not None:
        dataset = data.open()
        classes = Classes(dataset.class_names, dataset.templates)
    else:
        assert class_names is not None
        if blank := [name for name in class_names if not name.strip()]:
            raise ValueError(f"class_names holds a blank name: {blank[0]!r}")
        classes = Classes(tuple(class_names), PHOTO)
    for template in classes.templates:
        check_sentence("template", template)
    return classes


def check_sentence(what: str, sentence: str) -> None:
    """Raises ValueError unless the sentence has one {} for the class name, and no other braces."""
    try:
        fits = sentence.count("{}") == 1 and bool(sentence.format(""))
    except (ValueError, LookupError):
        fits = False
    if not fits:
        raise ValueError(f"a {what} needs one {{}} for the class name and no other braces, got {sentence!r}")


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
        Line(endpoint).client()  # builds the client and sends nothing
        return endpoint

    def identity(self) -> dict[str, str]:
        """What its answers depend on; how patiently it is asked is not part of it."""
        return {"model": self.model, "base_url": self.base_url}


@contextmanager
def asking(endpoint: EndpointConfig | None) -> Iterator[None]:
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
