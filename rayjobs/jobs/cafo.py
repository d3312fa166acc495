"""All of CaFo for one data set: class descriptions and generated images if they are to be made, features, sweep, test.

It runs cafo-prompt, cafo-generate, cafo-tune and cafo-eval one after the other, with the settings of this one config.
The same command resumes an interrupted run: no class is described or drawn twice, no trial is run again.
"""

from dataclasses import fields, replace
from typing import Any

from cafo.datasets import Dataset
from rayjobs.errors import ConfigError
from rayjobs.job_configs.cafo import Config
from rayjobs.jobs import cafo_eval, cafo_generate, cafo_prompt, cafo_tune
from rayjobs.lifecycle import job
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.tune.selection import check_reference, row_name


def prompt_settings(settings: Config) -> cafo_prompt.Config | None:
    """The settings of cafo-prompt, or None. Raises ConfigError if the descriptions are given as well."""
    if settings.prompt is None:
        return None
    if settings.data.prompts is not None:
        raise ConfigError("prompt makes the class descriptions that data.prompts already names: give one of the two")
    return cafo_prompt.Config(**_fields(settings.prompt), data=settings.data, run=_step_run(settings, "prompt"))


def generate_settings(settings: Config) -> cafo_generate.Config | None:
    """The settings of cafo-generate, or None; images are scored against the descriptions that cafo-prompt makes.

    Raises ConfigError if generated images are given as well.
    """
    if settings.generate is None:
        return None
    if settings.data.generated is not None:
        raise ConfigError("generate makes the images that data.generated already names: give one of the two")
    step = _fields(settings.generate)
    step["clip"] = settings.generate.clip or next(iter(settings.encoders.values()))
    return cafo_generate.Config(**step, data=with_prompts(settings).data, run=_step_run(settings, "generate"))


def with_prompts(settings: Config) -> Config:
    """The same settings with the descriptions that cafo-prompt makes as data.prompts."""
    step = prompt_settings(settings)
    prompts = settings.data.prompts if step is None else str(step.run.folder / cafo_prompt.PROMPTS)
    return replace(settings, data=replace(settings.data, prompts=prompts))


def tune_settings(settings: Config) -> cafo_tune.Config:
    """The settings of cafo-tune, on what the first two steps make."""
    generate, settings = generate_settings(settings), with_prompts(settings)
    data = settings.data if generate is None else replace(settings.data, generated=str(generate.list_path))
    own = {name: getattr(settings, name) for name in _names(cafo_tune.Config)}
    return cafo_tune.Config(**{**own, "data": data})


def check_rows(settings: Config, tune: cafo_tune.Config) -> None:
    """Check the search space, and that its tables will have the row of `reference`. Raises ConfigError if not."""
    tried = cafo_tune.settings_to_try(tune)
    check_reference(settings.reference, (row_name(setting, tune.search.compare) for setting in tried))


def plan(settings: Config) -> None:
    """Show what `run` would do, as far as it is known before the descriptions and images are made."""
    prompt, generate, tune = prompt_settings(settings), generate_settings(settings), tune_settings(settings)
    check_rows(settings, tune)
    if prompt:
        cafo_prompt.plan(prompt)
    if prompt and not (prompt.run.folder / cafo_prompt.PROMPTS).exists():
        return  # the next steps read the descriptions
    if generate:
        cafo_generate.plan(generate)
    if generate is None or generate.list_path.exists():
        cafo_tune.plan(with_estimate(tune, opens_test(settings, settings.data.open())))


@job
def run(settings: Config) -> dict[str, Any]:
    """Run all steps; return their results by step: prompt, generate, tune, eval.

    Without test images there is no eval, and tune estimates the accuracy.
    """
    prompt, generate, tune = prompt_settings(settings), generate_settings(settings), tune_settings(settings)
    check_rows(settings, tune)  # a sweep that cannot be run is refused before anything is asked or generated
    dataset = settings.data.open()
    has_test = opens_test(settings, dataset)
    if has_test:
        cafo_eval.open_targets(dataset, settings.targets)
    tune = with_estimate(tune, has_test)
    if prompt:
        cafo_prompt.check(prompt)
    elif generate:
        cafo_generate.check(generate)
    else:
        cafo_tune.check(tune)
    if prompt or generate:  # which may take hours, after which cafo-tune would find an encoder missing
        cafo_tune.open_used_encoders(tune, cafo_tune.settings_to_try(tune))
    cafo_tune.check_same_sweep(tune)
    folder = open_run(settings.run, settings)  # tune and eval write into the same folder, as parts of this run
    results: dict[str, Any] = {}
    if prompt:
        results["prompt"] = cafo_prompt.run(prompt)
    if generate:
        results["generate"] = cafo_generate.run(generate)
    results["tune"] = cafo_tune.run(tune)
    if not has_test:
        return results
    evaluation = cafo_eval.Config(
        sweep=str(folder),
        targets=settings.targets,
        reference=settings.reference,
        plots=settings.plots,
        scale=settings.scale,
    )
    return {**results, "eval": cafo_eval.run(evaluation)}


def opens_test(settings: Config, dataset: Dataset) -> bool:
    """Return whether there are test images, of the data set or of a target."""
    return bool(settings.targets or dataset.open_test())


def with_estimate(tune: cafo_tune.Config, has_test: bool) -> cafo_tune.Config:
    """The settings of cafo-tune, which estimates the accuracy where there are no test images to measure it on."""
    if has_test or tune.search.estimate is not None:
        return tune
    return replace(tune, search=replace(tune.search, estimate=True))


def _fields(step: Any) -> dict[str, Any]:
    return {name: getattr(step, name) for name in _names(type(step))}


def _names(section: Any) -> list[str]:
    return [field.name for field in fields(section)]


def _step_run(settings: Config, step: str) -> RunConfig:
    """The run of a step in a subfolder of this run."""
    return RunConfig(name=step, storage=str(settings.run.folder), cache=str(settings.run.cache_folder))
