"""Settings of a sweep over adapter-train's settings."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rayjobs.config import config
from rayjobs.data.records import SourceConfig
from rayjobs.tune.search_space import Distinct, Some


@config
class SweepConfig:
    """The search space, and how its trials are run and compared."""

    axes: dict[str, Annotated[list[Any], Some]] = Field(min_length=1)
    """Hyperparameters and their values, such as {adapter.n_layers: [10, 20, 30], adapter.method: [zero_init,
    rand_init]}. Settings with equal values are trained once."""
    method: Literal["grid", "each"] = "grid"
    """`grid`: all combinations of values. `each`: vary one hyperparameter at a time and keep the config's values of the
    others."""
    compare: str | None = None
    """Hyperparameter of `axes` whose values are compared with each other, each at the values of the others that are
    best for it, such as adapter.method with a learning rate for each; null makes no such table."""
    seeds: Distinct = Field(default=[0], min_length=1)
    """Training seeds; every setting is trained with each, and results are means over them."""
    at_once: int = Field(default=1, ge=1)
    """Trials that run at the same time, each with scale.workers workers. They share a GPU if scale.gpus_per_worker is a
    fraction."""
    scienceqa: SourceConfig | None = None
    """ScienceQA folder to measure every trial's accuracy on: its val split by default. The test split is refused,
    because a sweep chooses."""
