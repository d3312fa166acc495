"""The classes that CaFo's prompt and generate steps work on: names, and templates of sentences about them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cafo.dataset_layouts import PHOTO_TEMPLATES, check_templates
from cafo.prompt import with_spaces
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.errors import ConfigError


class ClassNames(NamedTuple):
    """The classes to describe, or to generate images of."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """sentences with one {} for the class name"""

    def missing(self, known: Mapping[str, Any]) -> list[str]:
        """Return the names without an entry in `known`, each once; underscores and spaces are taken as equal.

        A name with an empty entry is missing too.
        """
        present = {with_spaces(name) for name, entry in known.items() if entry}
        return [name for name in dict.fromkeys(self.names) if with_spaces(name) not in present]


def open_class_names(data: ImageDatasetConfig | None, class_names: list[str] | None) -> ClassNames:
    """Return the classes of a data set, or those of a plain list.

    Raises:
        ConfigError: both or neither of the two are given, or a name is blank.
        CafoError: a template has not exactly one {}.
    """
    if (data is None) == (class_names is None):
        raise ConfigError("give the classes: either data (a data set) or class_names (a plain list), one of the two")
    if data is not None:
        dataset = data.open()
        classes = ClassNames(dataset.class_names, dataset.templates)
    else:
        assert class_names is not None
        if blank := [name for name in class_names if not name.strip()]:
            raise ConfigError(f"class_names holds a blank name: {blank[0]!r}")
        classes = ClassNames(tuple(class_names), PHOTO_TEMPLATES)
    check_templates(classes.templates)
    return classes
