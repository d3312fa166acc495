"""All of CaFo for one data set: sentences and images where they are to be made, then encode, tune, choose on val, and
open test. The same as the other cafo jobs one after the other; the same command goes on where it stopped."""

from dataclasses import replace
from typing import Any

from pydantic import Field

from rayjobs.config import config
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.errors import UserError
from rayjobs.jobs import cafo_eval, cafo_generate, cafo_prompt, cafo_tune
from rayjobs.lifecycle import job
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.run_dir import RunConfig, open_run


@config
class GenerateStep(cafo_generate.Step):
    """Images of the classes, drawn and chosen by CLIP."""

    clip: VisionEncoderConfig | None = None
    """The CLIP that ranks what is drawn; by default the first of the encoders."""


@config
class Config(cafo_tune.Config):
    prompt: cafo_prompt.Step | None = None
    """Have the classes described first, in the folder `prompt` of the run; null takes data.prompts as it is."""
    generate: GenerateStep | None = None
    """Have images drawn next, in the folder `generate` of the run; null takes data.generated as it is."""
    targets: dict[str, ImageDatasetConfig] = Field(default_factory=dict)
    """Other test sets with the same classes, by name: the distribution shift."""
    plots: bool = True
    """Draw PNGs: accuracy over shots, the search for α and β, which source weighs most."""


def prompting(settings: Config) -> cafo_prompt.Config | None:
    """The settings of the first step, if it is to be made. Raises ValueError if its output is given as well."""
    if settings.prompt is None:
        return None
    if settings.data.prompts is not None:
        raise UserError("prompt makes the sentences that data.prompts already names: give one of the two")
    return cafo_prompt.Config(**_fields(settings.prompt), data=settings.data, run=_within(settings, "prompt"))


def generating(settings: Config) -> cafo_generate.Config | None:
    """The settings of the second step, if it is to be made; it scores images against the first one's sentences."""
    if settings.generate is None:
        return None
    if settings.data.generated is not None:
        raise UserError("generate makes the images that data.generated already names: give one of the two")
    step = _fields(settings.generate)
    step["clip"] = settings.generate.clip or next(iter(settings.encoders.values()))
    return cafo_generate.Config(**step, data=with_prompts(settings).data, run=_within(settings, "generate"))


def with_prompts(settings: Config) -> Config:
    """With the first step's sentences as the data set's."""
    made = prompting(settings)
    prompts = settings.data.prompts if made is None else str(made.run.folder / cafo_prompt.PROMPTS)
    return replace(settings, data=replace(settings.data, prompts=prompts))


def tuning(settings: Config) -> cafo_tune.Config:
    """The settings of the part before test, on what the first two steps make."""
    drawn, settings = generating(settings), with_prompts(settings)
    data = settings.data if drawn is None else replace(settings.data, generated=str(drawn.list_path))
    kept = {name: getattr(settings, name) for name in cafo_tune.Config.__dataclass_fields__}
    return cafo_tune.Config(**{**kept, "data": data})


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    asked, drawn, tuned = prompting(settings), generating(settings), tuning(settings)
    cafo_tune.tried_settings(tuned)
    if asked:
        cafo_prompt.plan(asked)
    if asked and not (asked.run.folder / cafo_prompt.PROMPTS).exists():
        return  # what comes next reads the sentences
    if drawn:
        cafo_generate.plan(drawn)
    if drawn is None or drawn.list_path.exists():
        cafo_tune.plan(tuned)


@job
def run(settings: Config) -> dict[str, Any]:
    """Returns all steps' results."""
    asked, drawn, tuned = prompting(settings), generating(settings), tuning(settings)
    cafo_tune.tried_settings(tuned)  # a sweep that cannot be run is told of before anything is asked or drawn
    if asked:
        cafo_prompt.check(asked)
    elif drawn:
        cafo_generate.check(drawn)
    else:
        cafo_tune.check(tuned)
    cafo_tune.same_sweep(tuned)
    folder = open_run(settings.run, settings)  # the sweep and the test are a part of this run
    results: dict[str, Any] = {}
    if asked:
        results["prompt"] = cafo_prompt.run(asked)
    if drawn:
        results["generate"] = cafo_generate.run(drawn)
    results["tune"] = cafo_tune.run(tuned)
    evaluation = cafo_eval.Config(
        sweep=str(folder), targets=settings.targets, plots=settings.plots, scale=settings.scale
    )
    return {**results, "eval": cafo_eval.run(evaluation)}


def _fields(step: Any) -> dict[str, Any]:
    return {name: getattr(step, name) for name in type(step).__dataclass_fields__}


def _within(settings: Config, step: str) -> RunConfig:
    return RunConfig(name=step, storage=str(settings.run.folder), cache=str(settings.run.cache_folder))
