"""The finals of adapter-tune: train the best setting of each compared value with more seeds, and measure them all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from rayjobs.cluster.ray_init import connect
from rayjobs.config import to_dict
from rayjobs.console import Progress
from rayjobs.data.records import Source
from rayjobs.data.trained_records import record_digest
from rayjobs.errors import ConfigError, DataError
from rayjobs.job_configs.adapter_tune import Config
from rayjobs.jobs import adapter_eval, adapter_train
from rayjobs.jobs.adapter_tune_trials import evaluation_of, reserving, results_of, trial_settings
from rayjobs.storage.files import write_json
from rayjobs.storage.fingerprint import file_fingerprints, fingerprint
from rayjobs.tune.adapter_finals import (
    FinalFigures,
    Finalist,
    describe_choice,
    differences,
    finals_table,
    method_comparison,
    read_final,
    write_comparison,
)
from rayjobs.tune.adapter_sweep import run_points
from rayjobs.tune.adapter_trial import AdapterTrial, Point
from rayjobs.tune.sweep_config import FinalsConfig

BASE = "base"
"""Folder of the base's own figures, in the run folder."""


def check_finals(settings: Config, first: AdapterTrial, *, weights: bool) -> None:
    """Check that the records of the finals can be measured, and that no trial is trained or chosen on them.

    Raises a UserError for the first problem. first: a trial of the sweep. weights: False to leave the weights of a base
    on the hub there.
    """
    finals, own = settings.sweep.finals, trial_settings(settings, first)
    if finals is None:
        return
    if settings.sweep.compare is None:
        raise ConfigError("sweep.finals measures the values that sweep.compare names: give sweep.compare, or neither")
    used = {record_digest(one) for source in own.data.all_sources() for one in source.read() if "rejected" not in one}
    for name, evaluation in final_evaluations(settings, own, None, settings.run.folder).items():
        (source,) = adapter_eval.check(evaluation, weights=weights).sources
        shared = sum(record_digest(one) in used for one in source.read() if "rejected" not in one)
        if shared:
            raise DataError(
                f"{source.path}: {shared:,} records of sweep.finals.{name} are among those of data.path and "
                "data.val_path: what a sweep trains on or chooses by measures nothing; name others"
            )


def final_evaluations(
    settings: Config, own: adapter_train.Config, adapter: str | None, folder: Path
) -> dict[str, adapter_eval.Config]:
    """The evaluations of a trial's adapter, or of its base alone, by what they measure: test, answers, other."""
    finals = _finals(settings)
    measured = {"test": ("loss", finals.test), "answers": ("answers", finals.test)}
    if finals.other is not None:
        measured["other"] = ("loss", finals.other)
    evaluations = {}
    for name, (task, source) in measured.items():
        measures = {
            "task": task,
            "data": {
                "path": [{key: value for key, value in to_dict(source).items() if value is not None}],
                "template": own.data.template,
                "max_length": finals.max_length or own.data.max_length,
            },
            "decoding": {"max_new_tokens": finals.max_new_tokens},
        }
        evaluations[name] = evaluation_of(own, adapter, measures, folder)
    return evaluations


def final_identity(settings: Config, own: adapter_train.Config) -> str:
    """Fingerprint of what a trial's figures depend on besides its adapter."""
    finals = _finals(settings)
    sources = [own.data.source(one, "test") for one in (finals.test, finals.other) if one is not None]
    how = [finals.max_length or own.data.max_length, finals.max_new_tokens, own.data.template]
    return fingerprint([[_content(source, with_images=own.vision is not None) for source in sources], how])[:10]


def _content(source: Source, *, with_images: bool) -> list[Any]:
    images = file_fingerprints(source.images, source.image_paths()) if with_images else {}
    return [source.digests(), source.format, dict(source.columns), source.split, images]


def _finals(settings: Config) -> FinalsConfig:
    assert settings.sweep.finals is not None
    return settings.sweep.finals


def final_points(settings: Config, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Point]]:
    """{value: a point for each seed}. chosen: {value: the overrides of its best setting}."""
    seeds = _finals(settings).seeds
    return {
        value: [Point(trials=[AdapterTrial(dict(overrides), seed)]) for seed in seeds]
        for value, overrides in chosen.items()
    }


@dataclass(frozen=True)
class Subject:
    """A model to measure. Tune would make a plain tuple of a named one."""

    own: adapter_train.Config
    """settings of its training"""
    adapter: str | None
    """None for the base alone"""
    folder: Path
    """where its `final.json` is"""


def measure_finals(settings: Config, folder: Path, points: Sequence[Point], worker: Mapping[str, float]) -> None:
    """Measure the base alone, and the adapter of every point whose training is finished."""
    trained = [
        reserving(trial_settings(settings, point.trials[0]), worker)
        for point in points
        if results_of(settings, point)[0].status == "finished"
    ]
    if not trained:
        raise DataError("no training of sweep.finals is finished: the loss of every one was no longer finite")
    subjects = [Subject(trained[0], None, folder / BASE)]
    subjects += [Subject(own, str(own.run.folder / adapter_train.ADAPTER_FILE), own.run.folder) for own in trained]
    left = [one for one in subjects if final_figures(settings, one.own, one.folder) is None]
    if left:
        connect(folder, settings.run.cache_folder)
        with Progress("measure", unit="models", total=len(subjects), done=len(subjects) - len(left)) as bar:
            measure = tune.with_parameters(measure_subject, settings=settings)
            run_points(measure, left, folder / "tune", settings.sweep.at_once, CountingProgress(bar))


class CountingProgress(tune.Callback):
    """Advances a progress bar at the end of every trial."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.bar.advance(1)


def measure_subject(config: dict[str, Any], *, settings: Config) -> None:
    """Measure one model, and write its `final.json`: the function that Tune runs."""
    subject: Subject = config["point"]
    identity, results = final_identity(settings, subject.own), {}
    for name, evaluation in final_evaluations(settings, subject.own, subject.adapter, subject.folder).items():
        run = replace(evaluation.run, name=f"final-{identity}-{name}")
        results[name] = adapter_eval.run(replace(evaluation, run=run))
    figures = FinalFigures(
        evaluated_on=identity,
        test_loss=results["test"]["loss"],
        exact_match=results["answers"]["exact_match"],
        rouge_l=results["answers"]["rouge_l"],
        answers=results["answers"]["answers"],
        other_loss=results["other"]["loss"] if "other" in results else None,
    )
    figures.write(subject.folder)
    tune.report(asdict(figures))


def final_figures(settings: Config, own: adapter_train.Config, folder: Path) -> FinalFigures | None:
    """The figures in a folder; None if there are none, or of other records than the finals measure on now."""
    kept = read_final(folder)
    return kept if kept is not None and kept.evaluated_on == final_identity(settings, own) else None


def write_finals(settings: Config, folder: Path, finals: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Write `comparison.md` and `comparison.json`; return the tables for `result.json`."""
    compared = settings.sweep.compare
    assert compared is not None
    finalists, configs = list[Finalist](), dict[str, dict[str, Any]]()
    for value, points in finals.items():
        choice = describe_choice(points[0].overrides, settings.sweep.space_of(value), compared)
        finalist = Finalist(value, choice, len(points), [], [])
        for point in points:
            own = trial_settings(settings, point.trials[0])
            if (figures := final_figures(settings, own, own.run.folder)) is not None:
                finalist.results.append(results_of(settings, point)[0])
                finalist.figures.append(figures)
                configs[own.run.name] = to_dict(own)
        finalists.append(finalist)
    base = read_final(folder / BASE)
    assert base is not None
    tables = {"compared": finals_table(compared, base, finalists), "differences": differences(compared, finalists)}
    write_comparison(folder / "comparison.md", tables.values())
    write_json(folder / "comparison.json", method_comparison(finalists, configs))
    return tables
