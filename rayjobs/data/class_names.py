"""What the first two steps of CaFo ask and of whom: the classes, a served model, and one source per folder of
answers."""

from rayjobs.errors import UserError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from pydantic import Field
from cafo.datasets import PHOTO
from cafo.openai_client import Endpoint, RateLimitedClient
from cafo.prompt import with_spaces
from rayjobs.config import config
from rayjobs.data.image_dataset import ImageDatasetConfig



class ClassNames(NamedTuple):
    """What is described and drawn."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """sentences with one {} for the class name"""

    def missing(self, known: Mapping[str, Any]) -> list[str]:
        """The names, each once, that are in `known` neither with underscores nor with spaces."""
        answered = {with_spaces(name) for name, answers in known.items() if answers}
        return [name for name in dict.fromkeys(self.names) if with_spaces(name) not in answered]


def open_class_names(data: ImageDatasetConfig | None, class_names: list[str] | None) -> ClassNames:
    """A data set's classes, or a plain list. Raises ValueError unless there is exactly one of them."""
    if (data is None) == (class_names is None):
        raise UserError("give the classes: either data (a data set) or class_names (a plain list), one of the two")
    if data is not None:
        dataset = data.open()
        classes = ClassNames(dataset.class_names, dataset.templates)
    else:
        assert class_names is not None
        if blank := [name for name in class_names if not name.strip()]:
            raise UserError(f"class_names holds a blank name: {blank[0]!r}")
        classes = ClassNames(tuple(class_names), PHOTO)
    for template in classes.templates:
        check_template("template", template)
    return classes


def check_template(what: str, sentence: str) -> None:
    """Raises ValueError unless the sentence has one {} for the class name, and no other braces."""
    try:
        fits = sentence.count("{}") == 1 and bool(sentence.format(""))
    except (ValueError, LookupError):
        fits = False
    if not fits:
        raise UserError(f"a {what} needs one {{}} for the class name and no other braces, got {sentence!r}")
