"""What a CaFo sweep tries: axes of settings, and the trials they make over shots and seeds."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field

from cafo.ensemble import table5
from cafo.search import BetaGrid
from rayjobs.config import config
from rayjobs.imagery import Sentences

Axis = Literal["generated", "views", "encoders", "ensemble", "sentences", "lr", "epochs", "alpha", "beta"]


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


@config
class SearchConfig:
    """How trials are drawn, and what each searches after training."""

    method: Literal["grid", "random"] = "grid"
    """Every setting, or `samples` drawn ones."""
    samples: int = Field(default=20, ge=1)
    """Settings that `random` draws."""
    seed: int = 0
    """Of the drawing."""
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

    def group(self, compare: Sequence[Axis]) -> dict[str, Any]:
        return {axis: getattr(self, axis) for axis in compare}


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


def settings_of(
    space: SpaceConfig, how: SearchConfig, encoders: Sequence[str], views: int, file: bool
) -> list[Setting]:
    """All settings to try, in order. Raises ValueError for names that do not exist, or a range in a grid."""
    sets = [tuple(names) for names in space.encoders or [list(encoders)]]
    known = {label for names in sets for label in table5(names)}
    if unknown := {name for names in sets for name in names} - set(encoders):
        raise ValueError(f"space.encoders: {', '.join(sorted(unknown))} not among encoders {', '.join(encoders)}")
    if unknown := set(space.ensemble) - known:
        raise ValueError(f"space.ensemble: {', '.join(sorted(unknown))} unknown; there are {', '.join(sorted(known))}")
    if over := [v for v in space.views or [] if not 1 <= v <= views]:
        raise ValueError(f"space.views: {over[0]} is not from 1 to features.views={views}")
    draw = random.Random(how.seed)
    if isinstance(space.lr, Range) and how.method == "grid":
        raise ValueError("space.lr: a range can be drawn from (search.method=random), not gone through; give a list")
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
    every = [Setting(*values) for values in itertools.product(*axes)]
    every = [setting for setting in every if setting.ensemble in table5(setting.encoders)]
    if how.method == "grid":
        return every
    drawn = []
    for group in _distinct(setting.group(how.compare) for setting in every):
        within = [setting for setting in every if setting.group(how.compare) == group]
        if isinstance(space.lr, Range):
            low, high = math.log(space.lr.low), math.log(space.lr.high)
            drawn += [draw.choice(within)._replace(lr=math.exp(draw.uniform(low, high))) for _ in range(how.samples)]
        else:
            drawn += draw.sample(within, min(how.samples, len(within)))
    return drawn


def trials_of(space: SpaceConfig, settings: Sequence[Setting]) -> list[Trial]:
    """Every setting at every K and seed; K = K' = 0 leaves no cache, hence no trial."""
    return [
        Trial(shots=shots, seed=seed, setting=setting)
        for shots, setting, seed in itertools.product(space.shots, settings, space.seeds)
        if shots or setting.generated
    ]


def _distinct(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({repr(group): group for group in groups}.values())
