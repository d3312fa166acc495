"""The rivals of a sweep: few-shot methods of `cafo.methods` that are fitted on the features of CaFo's trials.

A rival reads CLIP's features, those of the first encoder of a set, and the text classifier; it has no generated images.
A setting of it is a number of views and a source of sentences; its own hyperparameters are chosen in its trial.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cafo.errors import CafoError
from cafo.methods import find_method, full_name
from cafo.methods.base import Given, Method
from rayjobs.data.few_shot_images import Choices
from rayjobs.errors import ConfigError, DataError
from rayjobs.tune.search_space import Setting, SpaceConfig, Trial

_SHOWN = 5


def open_rivals(space: SpaceConfig) -> dict[str, Method]:
    """Return the rivals by name, with the constants that the config changes.

    Raises ConfigError for an unknown name or constant, or a name that occurs twice.
    """
    rivals: dict[str, Method] = {}
    for name, constants in space.rivals.items():
        try:
            known, method = full_name(name), find_method(name, constants)
        except CafoError as error:
            raise ConfigError(f"space.rivals: {error}") from error
        if known in rivals or known in space.methods:
            raise ConfigError(f"space.rivals: there are two rows called {known}; give each method once")
        rivals[known] = method
    return rivals


def enumerate_rivals(space: SpaceConfig, encoders: Sequence[str], views: int, file: bool) -> list[Setting]:
    """List the settings of all rivals, in order.

    Args:
        space: the search space.
        encoders: names of the configured encoders, the default set.
        views: encoded views per image, the default.
        file: whether the class descriptions come from a file by default.
    """
    clips = dict.fromkeys(names[0] for names in space.encoders or [list(encoders)])
    values = itertools.product(
        dict.fromkeys(space.views or [views]),
        clips,
        dict.fromkeys(space.sentences or ["file" if file else "templates"]),
    )
    none: dict[str, Any] = {"generated": 0, "ensemble": "", "lr": 0.0, "epochs": 0, "alpha": 0.0, "beta": 0.0}
    combinations = list(values)
    return [
        Setting(views=number, encoders=(clip,), sentences=sentences, method=name, rival=name, **none)
        for name in open_rivals(space)
        for number, clip, sentences in combinations
    ]


def check_rivals(rivals: Mapping[str, Method], trials: Iterable[Trial], choices: Choices, names: Sequence[str]) -> None:
    """Check that the few-shot choices have what the rivals need, before any image is encoded.

    Args:
        rivals: the rivals by name.
        trials: all trials of the sweep.
        choices: the few-shot choices.
        names: the classes.

    Raises:
        ConfigError: a method lacks something.
        DataError: a class has no training image.
    """
    for trial in trials:
        if not trial.setting.rival:
            continue
        counts = dict.fromkeys(names, 0)
        for item in choices[trial.shots, trial.seed].items:
            counts[item.class_name] += 1
        place = f"at K={trial.shots}, seed {trial.seed}"
        if empty := [name for name, count in counts.items() if not count]:
            shown = ", ".join(empty[:_SHOWN]) + (" …" if len(empty) > _SHOWN else "")
            raise DataError(
                f"space.rivals: {trial.setting.rival} needs an image of each class, and {place} {len(empty)} have "
                f"none ({shown}); add images, or leave the rivals out"
            )
        # whether a CLIP ends with a projection is known once it is loaded, which is before any image is encoded
        given = Given(min(counts.values()), trial.setting.views, prompts=True, projection=True)
        if lack := rivals[trial.setting.rival].lacks(given):
            raise ConfigError(f"space.rivals: {place}: {lack}. Or leave {trial.setting.rival} out")


def reads_sentences(method: Method) -> bool:
    """Return whether a method needs the embedding of each sentence."""
    enough = Given(shots=2, views=2, prompts=True, projection=True)
    return method.lacks(enough) is None and method.lacks(enough._replace(prompts=False)) is not None
