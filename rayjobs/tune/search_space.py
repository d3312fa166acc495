"""The search space of a CaFo sweep: hyperparameter settings, and the trials that they make over shots and seeds.

Importing this module imports no PyTorch, since a config's sections stand here.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

from pydantic import AfterValidator, Field, ValidationError

from cafo.choice_names import Rule, Select
from rayjobs.config import config
from rayjobs.data.image_dataset import Sentences
from rayjobs.errors import ConfigError
from rayjobs.storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from cafo.ensemble import Ensemble
    from cafo.search_grid import BetaGrid
    from cafo.selection import Choosing

Hyperparameter = Literal["generated", "views", "encoders", "ensemble", "sentences", "lr", "epochs", "alpha", "beta"]


def _check_distinct(values: list[int]) -> list[int]:
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise ValueError(f"{twice[0]} occurs twice, and would count twice in every mean")
    return values


Distinct = Annotated[list[int], AfterValidator(_check_distinct)]
"""A list in which no number occurs twice. Other lists of values may repeat one; it is tried once."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Some = Field(min_length=1)
"""At least one value."""


@config
class Range:
    """A range to sample from, uniformly in the logarithm."""

    low: float = Field(gt=0)
    """Smallest value."""
    high: float = Field(gt=0)
    """Largest value."""

    def draw(self, rng: random.Random) -> float:
        """Return a random value of the range."""
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))


@config
class SpaceConfig:
    """The search space: a list of values for each hyperparameter. Every (shots, seed) tries the same settings."""

    shots: Distinct = Field(default=[1, 2, 4, 8, 16], min_length=1)
    """K: numbers of training images per class."""
    seeds: Distinct = Field(default=[1, 2, 3], min_length=1)
    """Seeds for the few-shot choice and the training order; accuracies are means over them."""
    generated: list[int] = Field(default=[0], min_length=1)
    """K': numbers of generated images per class that are added to the cache."""
    views: Annotated[list[int], Some] | None = None
    """Numbers of augmented views that a key is the mean of; null uses all encoded views."""
    encoders: Annotated[list[Annotated[list[str], Some]], Some] | None = None
    """Sets of encoder names; the first of a set is the CLIP that computes p_ZS. Null uses all encoders in their
    order."""
    ensemble: list[str] = Field(default=["baseline zero-shot"], min_length=1)
    """Ensemble rules by their names in the paper's table 5, such as `clip only`, `average`, `baseline clip`."""
    sentences: Annotated[list[Sentences], Some] | None = None
    """Sources of the class descriptions, `file` or `templates`; null uses the file if data.prompts names one."""
    lr: Annotated[list[float], Some] | Range = Field(default=[1e-3])
    """Learning rates of the keys: a list, or a range {low: …, high: …} to sample from."""
    epochs: list[int] = Field(default=[20], min_length=1)
    """Numbers of epochs that the keys are trained; 0 leaves them untrained."""
    alpha: list[float] = Field(default=[1.0], min_length=1)
    """Values of α while the keys are trained."""
    beta: list[float] = Field(default=[5.5], min_length=1)
    """Values of β while the keys are trained."""
    methods: dict[str, dict[Hyperparameter, list[Any]]] = Field(default_factory=dict)
    """Methods to compare, by the name of their table row, each with the hyperparameters that it restricts, such as
    `CLIP cache: {encoders: [[clip]]}`. The best setting of each method is chosen separately."""
    rivals: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Other few-shot methods to compare, by their names in `cafo.methods`, each with the constants it changes, such
    as `{GDA: {}, APE: {gamma_steps: 5}}`. They read the features of a set's first encoder, and no generated images."""


@config
class SearchConfig:
    """The search: which settings are tried, and which α, β and ensemble weights each trial tries after training."""

    method: Literal["grid", "random", "asha", "optuna"] = "grid"
    """`grid`: every setting. `random`: `samples` random settings. `asha`: random settings under successive halving on
    the first seed, which stops the weak ones early; those that finish are run with the other seeds. `optuna`: for every
    K, `samples` settings that Optuna suggests, each judged by its mean over seeds."""
    samples: int = Field(default=20, ge=1)
    """Settings that `random` and `asha` sample, and that `optuna` suggests for every K; with `compare`, per value."""
    seed: int = 0
    """Seed for sampling settings and for Optuna's sampler."""
    grace_epochs: int = Field(default=1, ge=1)
    """asha: epochs before which no trial is stopped."""
    reduction: float = Field(default=3.0, gt=1)
    """asha: reduction factor r. After 1, r, r² … times grace_epochs, a trial continues if it is among the best 1/r of
    the trials that have reached that epoch."""
    suggested_at_once: int = Field(default=4, ge=1)
    """optuna: suggestions per batch. They are made before any of their results is known, so that they can run in
    parallel."""
    compare: list[Hyperparameter] = Field(default_factory=list)
    """Hyperparameters to compare instead of choosing among their values: a setting is chosen for each value."""
    beta_low: float = Field(default=0.1, gt=0)
    """Smallest value of β in the search."""
    beta_high: float = Field(default=12.0, gt=0)
    """Largest value of β in the search."""
    beta_steps: int = Field(default=200, ge=1)
    """Values of β on the first grid; finer grids follow around the best value."""
    temperatures: list[Positive] = Field(default=[1.0], min_length=1)
    """Candidate temperatures of the ensemble."""
    scales: list[NotNegative] = Field(default=[1.0, 0.0], min_length=1)
    """Candidate scales of every source of the ensemble; 0 leaves a source out, so that none can hurt."""
    drop_zero_shot: bool = True
    """Try also to leave p_ZS out, where it is the ensemble's baseline."""
    rule: Rule = "near_best"
    """Rule by which α, β, the weights and the epoch are chosen. `near_best` takes, of the values within one standard
    error of the highest accuracy, those with the lowest loss at a free temperature; no choice is less accurate than its
    best part. `highest` takes the highest accuracy, and the smallest α and the earliest epoch on ties."""
    select: Select | None = None
    """Images that these choices are made on. `val`: validation images. `crossfit`: training images, each held out of
    the training of the keys that predict it. `leave_one_out`: training images, each predicted without its own key, if
    no keys are trained. `prior`: none; what other data sets lead to expect. Null is `val` if there are validation
    images; otherwise `prior` at K = 1, `leave_one_out` if no keys are trained, and else `crossfit`."""
    folds: int = Field(default=5, ge=2)
    """crossfit: parts that the training images of each class are divided into, as far as there are as many."""
    join_val: bool = False
    """Make the validation images training images too, in addition to K of each class. Every label trains then, and
    the choice is made as if there were no validation images."""
    estimate: bool | None = None
    """Estimate the accuracy on new images, by choosing anew without each part of the images and scoring on that part;
    it takes about as long as the search. Null estimates it where the choice is made on training images."""
    batch: int = Field(default=256, ge=1)
    """Images per training step of the keys."""

    def select_at(self, shots: int, *, has_val: bool, trained: bool) -> Select:
        """Return the images that the choices at one K are made on.

        Args:
            shots: K.
            has_val: whether there are validation images.
            trained: whether keys are trained in any setting: the settings of a sweep are compared with each other.
        """
        from cafo.selection import default_select

        if self.select in ("crossfit", "leave_one_out") and shots < 2 and not self.join_val:
            return "prior"
        has_val = has_val and not self.join_val
        return self.select or default_select(has_val=has_val, shots=2 if self.join_val else shots, trained=trained)

    def choosing(self, ensemble: Ensemble, encoders: Sequence[str]) -> Choosing:
        """The settings of a choice, for one ensemble of some encoders. Raises ConfigError as `grid` does."""
        from cafo.search import weight_grid
        from cafo.selection import Choosing

        sources = ensemble.sources or tuple(encoders)
        candidates = weight_grid(ensemble, sources, self.temperatures, self.scales, drop_zero_shot=self.drop_zero_shot)
        return Choosing(
            grid=self.grid(),
            ensembles=tuple(candidates),
            rule=self.rule,
            folds=self.folds,
            estimate=self.estimate,
        )

    def grid(self) -> BetaGrid:
        """The grid of β. Raises ConfigError if its bounds are in the wrong order, or all scales are 0."""
        from cafo.search_grid import BetaGrid

        if not any(self.scales):
            raise ConfigError("search.scales: at least one scale must be above 0, or every source is left out")
        if self.beta_low > self.beta_high:
            raise ConfigError(f"search.beta_low is {self.beta_low}, above search.beta_high, {self.beta_high}")
        return BetaGrid(low=self.beta_low, high=self.beta_high, steps=self.beta_steps)


class Setting(NamedTuple):
    """One value for each hyperparameter: a point of the search space, without shots and seed."""

    generated: int
    views: int
    encoders: tuple[str, ...]
    ensemble: str
    sentences: Sentences
    lr: float
    epochs: int
    alpha: float
    beta: float
    method: str = ""
    rival: str = ""
    """name of a method of `cafo.methods` that is fitted in place of CaFo; it has only views, encoders and sentences"""

    def compared_values(self, compare: Sequence[Hyperparameter]) -> dict[str, Any]:
        """The method and the values of the compared hyperparameters: a setting is chosen for each combination."""
        names = [name for name in compare if not self.rival or name in ("views", "encoders", "sentences")]
        return {"method": self.method, **{name: getattr(self, name) for name in names}}

    def to_json(self) -> dict[str, Any]:
        """The values as plain data, without an empty `rival`, so that a choice keeps its digest."""
        return {name: value for name, value in self._asdict().items() if name != "rival" or value}

    def group_key(self, compare: Sequence[Hyperparameter]) -> tuple[Hashable, ...]:
        """The compared values alone, the same for all settings among which one is chosen."""
        return tuple(self.compared_values(compare).values())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting at one K and seed."""

    shots: int
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        digest = fingerprint([self.shots, self.seed, list(self.setting.to_json().values())])
        return f"shots{self.shots}-seed{self.seed}-{digest[:10]}"

    def group_key(self, compare: Sequence[Hyperparameter]) -> tuple[Hashable, ...]:
        """K and the compared values, the same for all trials that are compared with each other."""
        return self.shots, *self.setting.group_key(compare)


def enumerate_settings(
    space: SpaceConfig, search: SearchConfig, encoders: Sequence[str], views: int, file: bool
) -> list[Setting]:
    """List the settings to try, in order; for optuna, all that it may suggest (lr is NaN if it is a range).

    Args:
        encoders: names of the configured encoders, the default set.
        views: encoded views per image, the default.
        file: whether the class descriptions come from a file by default.

    Raises:
        ConfigError: for names that do not exist, values out of range, or a range in a grid search.
    """
    if space.methods:
        return [
            setting._replace(method=name)
            for name in space.methods
            for setting in enumerate_settings(method_space(space, name), search, encoders, views, file)
        ]
    from cafo.ensemble import table5

    encoder_sets = [tuple(names) for names in space.encoders or [list(encoders)]]
    _check_space(space, search, encoder_sets, encoders, views)
    values: list[Sequence[Any]] = [
        space.generated,
        space.views or [views],
        encoder_sets,
        space.ensemble,
        space.sentences or ["file" if file else "templates"],
        [math.nan] if isinstance(space.lr, Range) else space.lr,
        space.epochs,
        space.alpha,
        space.beta,
    ]
    combined = itertools.starmap(Setting, itertools.product(*map(dict.fromkeys, values)))
    # a rule that names an encoder has no meaning for a set without it
    settings = [setting for setting in combined if setting.ensemble in table5(setting.encoders)]
    if not settings:
        raise ConfigError("space.ensemble: each of its rules names an encoder that no set of space.encoders has")
    return settings if search.method in ("grid", "optuna") else _sample_settings(settings, space.lr, search)


def _check_space(
    space: SpaceConfig,
    search: SearchConfig,
    encoder_sets: Sequence[tuple[str, ...]],
    encoders: Sequence[str],
    views: int,
) -> None:
    from cafo.ensemble import table5

    if unknown := {name for names in encoder_sets for name in names} - set(encoders):
        raise ConfigError(f"space.encoders: {', '.join(sorted(unknown))} not among encoders {', '.join(encoders)}")
    rules = {rule for names in encoder_sets for rule in table5(names)}
    if unknown := set(space.ensemble) - rules:
        raise ConfigError(f"space.ensemble: {', '.join(sorted(unknown))} unknown; there are {', '.join(sorted(rules))}")
    if twice := [names for names in encoder_sets if len(set(names)) < len(names)]:
        raise ConfigError(f"space.encoders: {', '.join(twice[0])} names an encoder twice")
    if isinstance(space.lr, Range) and space.lr.low > space.lr.high:
        raise ConfigError(f"space.lr: low is {space.lr.low}, above high, {space.lr.high}")
    if outside := [number for number in space.views or [] if not 1 <= number <= views]:
        raise ConfigError(f"space.views: {outside[0]} is not from 1 to features.views={views}")
    for name in ("shots", "generated", "lr", "epochs", "alpha", "beta"):
        values = getattr(space, name)
        if not isinstance(values, Range) and min(values, default=0) < 0:
            raise ConfigError(f"space.{name}: {min(values)} is negative")
    if isinstance(space.lr, Range) and search.method == "grid":
        raise ConfigError(
            "space.lr: a range needs search.method random, asha or optuna; for a grid search, give a list of values"
        )


def _sample_settings(settings: Sequence[Setting], lr: list[float] | Range, search: SearchConfig) -> list[Setting]:
    """`search.samples` random settings for each combination of compared values."""
    rng, sampled = random.Random(search.seed), list[Setting]()
    for group in group_settings(settings, search.compare):
        if isinstance(lr, Range):
            sampled += [rng.choice(group)._replace(lr=lr.draw(rng)) for _ in range(search.samples)]
        else:
            sampled += rng.sample(group, min(search.samples, len(group)))
    return sampled


def group_settings(settings: Iterable[Setting], compare: Sequence[Hyperparameter]) -> list[list[Setting]]:
    """Group settings by their compared values; a choice is made within each group."""
    groups: dict[tuple[Hashable, ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.group_key(compare), []).append(setting)
    return list(groups.values())


def method_space(space: SpaceConfig, method: str) -> SpaceConfig:
    """The search space of one method. Raises ConfigError for values that a hyperparameter cannot take."""
    try:
        return replace(space, methods={}, **cast(dict[str, Any], space.methods[method]))
    except ValidationError as error:
        first = error.errors()[0]
        told = f"space.methods.{method}: {first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        raise ConfigError(told) from error


def enumerate_trials(space: SpaceConfig, settings: Sequence[Setting]) -> list[Trial]:
    """Every setting at every K and seed. K = K' = 0 leaves the cache empty and makes no trial."""
    return [
        trial
        for shots, setting in itertools.product(space.shots, settings)
        for trial in trials_over_seeds(space, shots, setting)
    ]


def trials_over_seeds(space: SpaceConfig, shots: int, setting: Setting) -> Iterator[Trial]:
    """A setting's trials at one K, one for each seed."""
    if shots or setting.generated:
        yield from (Trial(shots=shots, seed=seed, setting=setting) for seed in space.seeds)
