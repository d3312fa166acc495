"""All of CaFo for one data set: encode, tune, choose on val, then open test. Step by step the other cafo jobs do the
same; sentences and generated images are made by cafo-prompt and cafo-generate before."""

from typing import Any

from pydantic import Field

from rayjobs.config import config
from rayjobs.imagery import ImagesConfig
from rayjobs.jobs import cafo_eval, cafo_tune


@config
class Config(cafo_tune.Config):
    targets: dict[str, ImagesConfig] = Field(default_factory=dict)
    """Other test sets with the same classes, by name: the distribution shift."""
    plots: bool = True
    """Draw PNGs, where the `plots` extra is installed."""


def tuning(settings: Config) -> cafo_tune.Config:
    """The settings of the part before test."""
    names = cafo_tune.Config.__dataclass_fields__
    return cafo_tune.Config(**{name: getattr(settings, name) for name in names})


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    cafo_tune.plan(tuning(settings))


def run(settings: Config) -> dict[str, Any]:
    """Returns both steps' results."""
    tuned = cafo_tune.run(tuning(settings))
    evaluation = cafo_eval.Config(
        sweep=str(settings.run.folder), targets=settings.targets, plots=settings.plots, scale=settings.scale
    )
    return {"tune": tuned, "eval": cafo_eval.run(evaluation)}
