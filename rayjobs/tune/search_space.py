"""What a CaFo sweep tries: axes of settings, and the trials they make over shots and seeds."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from cafo.ensemble import table5
from cafo.search import BetaGrid
from rayjobs.config import config
from rayjobs.data.image_dataset import Sentences
from rayjobs.errors import UserError

Axis = Literal["generated", "views", "encoders", "ensemble", "sentences", "lr", "epochs", "alpha", "beta"]
H = TypeVar("H", bound=Hashable)


@config
class Range:
    """Values between two ends, drawn evenly in their logarithm."""

    low: float = Field(gt=0)
    """The smallest."""
    high: float = Field(gt=0)
    """The largest."""


@config
class SpaceConfig:
    """What trials try. Each axis is a list; every (shots, seed) sees the same settings."""

    shots: list[int] = Field(default=[1, 2, 4, 8, 16], min_length=1)
    """K: training images of each class."""
    seeds: list[int] = Field(default=[1, 2, 3], min_length=1)
    """Of the few-shot choice and the order of training; accuracies are means over them."""
    generated: list[int] = Field(default=[0], min_length=1)
    """K': generated images of each class that join the cache."""
    views: list[int] | None = None
    """Augmented views that keys average over; null takes all that are encoded."""
    encoders: list[list[str]] | None = None
    """Sets of encoders; the first of a set is the CLIP that gives p_ZS. Null takes all in their order."""
    ensemble: list[str] = Field(default=["baseline zero-shot"], min_length=1)
    """Rules by the names of the paper's table 5, such as `clip only`, `average`, `baseline clip`."""
    sentences: list[Sentences] | None = None
    """`file` or `templates`; null takes the file where data.prompts names one."""
    lr: list[float] | Range = Field(default=[1e-3])
    """Learning rates of the keys, or a range to draw from."""
    epochs: list[int] = Field(default=[20], min_length=1)
    """Epochs of the keys' training; 0 leaves them untrained."""
    alpha: list[float] = Field(default=[1.0], min_length=1)
    """Initial α, at which keys are trained."""
    beta: list[float] = Field(default=[5.5], min_length=1)
    """Initial β, at which keys are trained."""
    methods: dict[str, dict[Axis, list[Any]]] = Field(default_factory=dict)
    """Rows of the table by name, each with the axes that it narrows, such as `CLIP cache: {encoders: [[clip]]}`; a
    choice is made for each."""


@config
class SearchConfig:
    """How trials are drawn, and what each searches after training."""

    method: Literal["grid", "random", "asha", "optuna"] = "grid"
    """`grid`: every setting. `random`: `samples` drawn ones. `asha`: drawn ones race on the first seed, where the weak
    are stopped early, and those that finish go on to the other seeds. `optuna`: `samples` suggestions for every K, each
    judged by its mean over seeds."""
    samples: int = Field(default=20, ge=1)
    """Settings that `random` and `asha` draw, and that `optuna` suggests for every K; with `compare`, per value."""
    seed: int = 0
    """Of the drawing and the suggestions."""
    grace_epochs: int = Field(default=1, ge=1)
    """asha: no trial is stopped before so many epochs."""
    reduction: float = Field(default=3.0, gt=1)
    """asha: at 1, r, r² … times grace_epochs a trial goes on if it is in the best 1/r of those that came so far."""
    suggested_at_once: int = Field(default=4, ge=1)
    """optuna: suggestions made together, before their results are known, so that they can run at once."""
    compare: list[Axis] = Field(default_factory=list)
    """Axes to report side by side rather than to choose over: a choice is made for each of their values."""
    beta_low: float = Field(default=0.1, gt=0)
    """β's smallest value."""
    beta_high: float = Field(default=12.0, gt=0)
    """β's largest value."""
    beta_steps: int = Field(default=200, ge=1)
    """Values of β on the first grid; finer ones follow around the best."""
    temperatures: list[float] = Field(default=[1.0], min_length=1)
    """Candidates for the ensemble's temperature."""
    scales: list[float] = Field(default=[1.0], min_length=1)
    """Candidates for every source's scale."""
    batch: int = Field(default=256, ge=1)
    """Images per step of the keys' training."""

    def grid(self) -> BetaGrid:
        return BetaGrid(low=self.beta_low, high=self.beta_high, steps=self.beta_steps)


class Setting(NamedTuple):
    """One point of the space besides shots and seed."""

    generated: int
    views: int
    encoders: tuple[str, ...]
    ensemble: str
    sentences: str
    lr: float
    epochs: int
    alpha: float
    beta: float
    method: str = ""

    def group(self, compare: Sequence[Axis]) -> dict[str, Any]:
        return {"method": self.method, **{axis: getattr(self, axis) for axis in compare}}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting at one K and seed."""

    shots: int
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps([self.shots, self.seed, self.setting]).encode()).hexdigest()
        return f"shots{self.shots}-seed{self.seed}-{digest[:10]}"


def enumerate_settings(
    space: SpaceConfig, how: SearchConfig, encoders: Sequence[str], views: int, file: bool
) -> list[Setting]:
    """All settings to try, in order; for optuna all that it may suggest, a range's lr being NaN.

    Raises ValueError for names that do not exist, or a range in a grid.
    """
    if space.methods:
        narrowed = {name: method_space(space, name) for name in space.methods}
        return [
            setting._replace(method=name)
            for name, own in narrowed.items()
            for setting in enumerate_settings(own, how, encoders, views, file)
        ]
    sets = [tuple(names) for names in space.encoders or [list(encoders)]]
    known = {label for names in sets for label in table5(names)}
    if unknown := {name for names in sets for name in names} - set(encoders):
        raise UserError(f"space.encoders: {', '.join(sorted(unknown))} not among encoders {', '.join(encoders)}")
    if unknown := set(space.ensemble) - known:
        raise UserError(f"space.ensemble: {', '.join(sorted(unknown))} unknown; there are {', '.join(sorted(known))}")
    if over := [v for v in space.views or [] if not 1 <= v <= views]:
        raise UserError(f"space.views: {over[0]} is not from 1 to features.views={views}")
    for axis in ("shots", "generated", "lr", "epochs", "alpha", "beta"):
        values = getattr(space, axis)
        if not isinstance(values, Range) and min(values, default=0) < 0:
            raise UserError(f"space.{axis}: {min(values)} is negative")
    draw = random.Random(how.seed)
    if isinstance(space.lr, Range) and how.method == "grid":
        raise UserError("space.lr: a range can be drawn from, not gone through: give a list, or another search.method")
    axes: list[Sequence[Any]] = [
        space.generated,
        space.views or [views],
        sets,
        space.ensemble,
        space.sentences or ["file" if file else "templates"],
        [math.nan] if isinstance(space.lr, Range) else space.lr,
        space.epochs,
        space.alpha,
        space.beta,
    ]
    every = [Setting(*values) for values in itertools.product(*(list(dict.fromkeys(axis)) for axis in axes))]
    every = [setting for setting in every if setting.ensemble in table5(setting.encoders)]
    if how.method in ("grid", "optuna"):
        return every
    drawn = []
    for within in group_settings(every, how.compare):
        if isinstance(space.lr, Range):
            low, high = math.log(space.lr.low), math.log(space.lr.high)
            drawn += [draw.choice(within)._replace(lr=math.exp(draw.uniform(low, high))) for _ in range(how.samples)]
        else:
            drawn += draw.sample(within, min(how.samples, len(within)))
    return drawn


def group_settings(settings: Iterable[Setting], compare: Sequence[Axis]) -> list[list[Setting]]:
    """The settings apart by their values of the compared axes: rivals are within a group."""
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        found.setdefault(repr(setting.group(compare)), []).append(setting)
    return list(found.values())


def method_space(space: SpaceConfig, method: str) -> SpaceConfig:
    """The space of one of its methods. Raises ValueError for values that no axis takes."""
    try:
        return replace(space, methods={}, **space.methods[method])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"space.methods.{method}: {first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error


def enumerate_trials(space: SpaceConfig, settings: Sequence[Setting]) -> list[Trial]:
    """Every setting at every K and seed; K = K' = 0 leaves no cache, hence no trial."""
    return [
        trial
        for shots, setting in itertools.product(space.shots, settings)
        for trial in over_seeds(space, shots, setting)
    ]


def over_seeds(space: SpaceConfig, shots: int, setting: Setting) -> Iterator[Trial]:
    """A setting's trials at one K, one for each seed."""
    if shots or setting.generated:
        yield from (Trial(shots=shots, seed=seed, setting=setting) for seed in space.seeds)


def suggest(study: Any, within: Sequence[Setting], lr: list[float] | Range) -> Setting:
    """One of the settings, axis by axis as an Optuna trial suggests among what the axes before have left."""
    left = list(within)
    for axis in Setting._fields:
        values = _distinct(getattr(setting, axis) for setting in left)
        if len(values) > 1:
            # one name, one set of choices: which rules there are depends on the encoders
            name = f"ensemble of {left[0].encoders}" if axis == "ensemble" else axis
            value = values[study.suggest_categorical(name, list(range(len(values))))]
            left = [setting for setting in left if getattr(setting, axis) == value]
    if isinstance(lr, Range) and math.isnan(left[0].lr):
        return left[0]._replace(lr=study.suggest_float("lr", lr.low, lr.high, log=True))
    return left[0]


def _distinct(values: Iterable[H]) -> list[H]:
    return list(dict.fromkeys(values))
