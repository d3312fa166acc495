"""Settings of a sweep over adapter-train's settings."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rayjobs.config import config
from rayjobs.data.records import SourceConfig
from rayjobs.tune.search_space import Distinct, Range, Some

Axes = dict[str, Annotated[list[Any], Some] | Range]


@config
class FinalsConfig:
    """The measurement that a comparison ends with: more seeds, on records that nothing was chosen on."""

    test: SourceConfig
    """Records to measure on: their loss, and the greedy answers to them by exact match and ROUGE-L. None of them may be
    trained on."""
    other: SourceConfig | None = None
    """Text of another kind than the training records, such as general instructions; null measures none. What its loss
    rises by, from the base's, says what training made the model forget."""
    seeds: Distinct = Field(default=[0, 1, 2], min_length=1)
    """Training seeds of the best setting of each value of `compare`."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens of these records; null for data.max_length."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum number of tokens of an answer."""


@config
class SweepConfig:
    """The search space, and how its trials are run and compared."""

    axes: Axes = Field(min_length=1)
    """Hyperparameters and their values, such as {adapter.n_layers: [10, 20, 30], adapter.method: [zero_init,
    rand_init]}. Settings with equal values are trained once. With `optuna`, a number may have a range in place of
    values, such as {optimizer.base_lr: {low: 1e-3, high: 1}}, which is searched in its logarithm."""
    method: Literal["grid", "each", "optuna"] = "grid"
    """`grid`: all combinations of values. `each`: vary one hyperparameter at a time and keep the config's values of the
    others. `optuna`: `samples` settings that Optuna's TPE suggests by the results before, on held-out loss, or on
    accuracy where `scienceqa` measures it; weak trials are stopped early."""
    samples: int = Field(default=20, ge=1)
    """optuna: settings to suggest; with `compare`, for each of its values."""
    seed: int = 0
    """optuna: seed of its sampler."""
    suggested_at_once: int = Field(default=4, ge=1)
    """optuna: suggestions per batch. They are made before any of their results is known, so that they can run in
    parallel."""
    keep_percent: float | None = Field(default=50, gt=0, le=100)
    """optuna: a trial is stopped when the lowest of its held-out losses so far is above this percentile of the losses
    that finished trials of earlier batches had at the same step; 50 is the median. Only a setting's first seed is
    stopped, and the others are then not trained. null stops none."""
    keep_first: int = Field(default=4, ge=1)
    """optuna: finished trials before which none is stopped."""
    keep_steps: int = Field(default=0, ge=0)
    """optuna: steps before which none is stopped, such as those of a long warm-up."""
    budget_steps: int | None = Field(default=None, ge=1)
    """optuna: no batch is suggested after the trials have made so many optimizer steps in all; null sets no limit."""
    budget_minutes: float | None = Field(default=None, gt=0)
    """optuna: no batch is suggested after the trials have taken so many minutes, added up and divided by `at_once`;
    null sets no limit. With such a limit, the number of trials depends on the machine."""
    compare: str | None = None
    """Hyperparameter of `axes` whose values are compared with each other, each at the values of the others that are
    best for it, such as adapter.method with a learning rate for each; null makes no such table."""
    axes_of: dict[str, Axes] = Field(default_factory=dict)
    """{value of `compare`: what it has in place of some of `axes`}, such as {full: {optimizer.base_lr: [1e-4, 1e-3]}}:
    methods need learning rates of their own. A value with more settings than others is a little ahead by that alone."""
    finals: FinalsConfig | None = None
    """Train the best setting of each value of `compare` with more seeds, once it is chosen, and measure it on records
    of their own; null compares by what the settings were chosen on."""
    seeds: Distinct = Field(default=[0], min_length=1)
    """Training seeds; every setting is trained with each, and results are means over them."""
    at_once: int = Field(default=1, ge=1)
    """Trials that run at the same time, each with scale.workers workers. They share a GPU if scale.gpus_per_worker is a
    fraction."""
    scienceqa: SourceConfig | None = None
    """ScienceQA folder to measure every trial's accuracy on: its val split by default. The test split is refused,
    because a sweep chooses."""

    def space_of(self, value: Any) -> Axes:
        """Return the axes that a value of `compare` is tried with."""
        return {**self.axes, **self.axes_of.get(str(value), {})}
