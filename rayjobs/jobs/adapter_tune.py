"""Train adapters over a search space of adapter-train's settings with Ray Tune: the paper's ablations, or a search.

Each trial is an ordinary adapter-train run in `trials/`. The best setting is chosen on validation loss, or on the
accuracy of the ScienceQA problems that `sweep.scienceqa` names, and written as `best.yaml`, a config of adapter-train.
`sweep.method=optuna` searches, and stops weak trials early; otherwise all settings of a grid are trained.
`sweep.compare` puts the values of one hyperparameter, such as adapter.method, beside each other, each with the learning
rate that is best for it (`comparison.md`); `sweep.finals` then trains these with more seeds and measures them, and the
base, on other records. The same command resumes an interrupted sweep: finished trials are not run
again, an interrupted one continues from its last checkpoint, and a search comes to the same end.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import tune

from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerRange
from rayjobs.config import to_dict
from rayjobs.console import Progress, show_table
from rayjobs.errors import ConfigError
from rayjobs.job_configs.adapter_tune import Config
from rayjobs.jobs import adapter_train
from rayjobs.jobs.adapter_tune_finals import (
    check_finals,
    final_points,
    measure_finals,
    write_finals,
)
from rayjobs.jobs.adapter_tune_trials import (
    TrialChecks,
    results_of,
    train_point,
    trial_folder,
    trial_settings,
)
from rayjobs.lifecycle import job
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.files import write_parquet, write_text
from rayjobs.storage.yaml_file import dump_yaml
from rayjobs.tune.adapter_study import AdapterStudy
from rayjobs.tune.adapter_sweep import (
    AdapterSweepProgress,
    best_of_values,
    compare_values,
    compared_values,
    enumerate_overrides,
    plot_first_steps,
    plot_settings,
    run_points,
    sample_overrides,
    search_spaces,
    summarize,
    table_columns,
    whole_space,
    write_table,
)
from rayjobs.tune.adapter_trial import AdapterTrial, AdapterTrialResult, Point, describe_overrides
from rayjobs.tune.search_space import Range
from rayjobs.tune.sweep_config import Axes, SweepConfig

BEST_CONFIG = "best.yaml"


def check(settings: Config, *, weights: bool = True) -> list[AdapterTrial]:
    """Check the settings of every trial, or of some that have every value of a search; return these trials.

    Raises a UserError for the first problem; ProvenanceError if the run folder has trials of other settings or data
    that the sweep would take for its own.

    weights: False to leave the weights of a base on the hub there.
    """
    if settings.scale.workers.min < settings.scale.workers.max:  # Tune has to know how many trials there is room for
        raise ConfigError(f"scale.workers must be one number in a sweep, got {settings.scale.workers}")
    if fixed := [name for name in settings.sweep.axes if name == "train.seed" or name.split(".")[0] == "run"]:
        raise ConfigError(
            f"sweep.axes cannot hold {', '.join(fixed)}: seeds are given as sweep.seeds, and every trial has a folder "
            "of its own"
        )
    _check_method(settings)
    sweep = settings.sweep
    tried = sample_overrides(sweep) if sweep.method == "optuna" else enumerate_overrides(sweep)
    trials = [AdapterTrial(*pair) for pair in itertools.product(tried, sweep.seeds)]
    checks = TrialChecks(settings, weights=weights)
    for trial in trials:
        checks.check(trial)
    check_finals(settings, trials[0], weights=weights)
    if sweep.method == "optuna" and checks.have_weights:
        _repeat_search(settings, checks)
    return trials


def _repeat_search(settings: Config, checks: TrialChecks) -> None:
    """Repeat a search as far as the results of its trials are known.

    Raises ProvenanceError for a trial of other settings or data that it would take for its own.
    """
    for study in open_studies(settings, checks, []):
        suggested = 0
        while isinstance(study.suggest(str(suggested)), dict):  # the rest of a batch is suggested without its results
            suggested += 1


def _check_method(settings: Config) -> None:
    """Raise ConfigError for settings of the sweep that its method has no use for."""
    sweep, searched = settings.sweep, settings.sweep.method == "optuna"
    _check_ranges("sweep.axes", sweep.axes, searched=searched)
    _check_compared(sweep)
    if searched and len(sweep.axes) == (sweep.compare is not None):
        raise ConfigError(f"sweep.axes has {sweep.compare} alone, which is compared: name something to search too")
    if searched and not (settings.data.val_sources() or settings.data.held_out_fraction):
        raise ConfigError(
            "sweep.method optuna searches on held-out loss, and no record is held out: give data.val_path, or a "
            "data.val_fraction above 0"
        )


def _check_ranges(where: str, axes: Axes, *, searched: bool) -> None:
    for name, axis in axes.items():
        if isinstance(axis, Range) and not searched:
            raise ConfigError(f"{where}: {name} is a range, which needs sweep.method optuna; or give it values")
        if isinstance(axis, Range) and axis.low > axis.high:
            raise ConfigError(f"{where}: {name} is a range from {axis.low} to {axis.high}: low is above high")


def _check_compared(sweep: SweepConfig) -> None:
    """Raise ConfigError if `compare` names no list of values, or `axes_of` other values or axes than those."""
    compared_axis = sweep.axes.get(sweep.compare) if sweep.compare else None
    names = list(map(str, compared_axis)) if isinstance(compared_axis, list) else []
    if sweep.compare and (sweep.method == "each" or not names):
        raise ConfigError(
            f"sweep.compare is {sweep.compare}: it must be one of sweep.axes ({', '.join(sweep.axes)}) with a list of "
            "values, and sweep.method grid or optuna, so that every value meets the same others"
        )
    for value, own in sweep.axes_of.items():
        _check_ranges(f"sweep.axes_of.{value}", own, searched=sweep.method == "optuna")
        if value not in names:
            raise ConfigError(
                f"sweep.axes_of has {value}, which is no value of sweep.compare, {sweep.compare} ({', '.join(names)}): "
                "correct its name, or leave it out"
            )
        for name, axis in own.items():
            if name == sweep.compare or type(axis) is not type(sweep.axes.get(name)):
                raise ConfigError(
                    f"sweep.axes_of.{value} has {name}, which must be one of sweep.axes, other than {sweep.compare}: a "
                    "range there if it is a range here, or a list if it is one here"
                )


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    trials, sweep = check(settings, weights=False), settings.sweep
    seeds = ", ".join(map(str, sweep.seeds))
    if sweep.method == "optuna":
        searched = [
            [name, f"{axis.low:g} to {axis.high:g}" if isinstance(axis, Range) else ", ".join(map(str, axis))]
            for name, axis in whole_space(sweep).items()
        ]
        count = max(len(compared_values(sweep)), 1) * sweep.samples
        title = f"up to {count} settings, each with seeds {seeds}, {sweep.at_once} at once"
        show_table(title, ["hyperparameter", "values"], searched)
        show_finals(sweep)
        return
    rows = [[describe_overrides(overrides), seeds] for overrides in enumerate_overrides(sweep)]
    different = len({trial_folder(settings, trial) for trial in trials})
    title = f"{len(trials)} trials, {different} of them different, {sweep.at_once} at once"
    show_table(title, ["setting", "seeds"], rows)
    show_finals(sweep)


def show_finals(sweep: SweepConfig) -> None:
    """Show what the finals of a sweep measure, if it has some."""
    if (finals := sweep.finals) is None:
        return
    other = [["loss on other text", finals.other.path]] if finals.other else []
    rows = [
        ["trained", f"the best setting of each {sweep.compare}, with seeds {', '.join(map(str, finals.seeds))}"],
        ["loss and answers", finals.test.path],
        *other,
    ]
    show_table("then", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Run the sweep; return and write `result.json`, with `results.parquet`, `best.yaml`, tables and plots."""
    check(settings)
    folder = open_run(settings.run, settings)
    points = run_search(settings, folder) if settings.sweep.method == "optuna" else run_grid(settings, folder)
    measured = [(point, results_of(settings, point)) for point in points]
    summary = write_tables(settings, folder, measured)
    if settings.sweep.finals is not None:
        summary |= run_finals(settings, folder, measured)
    best = next(point for point in points if point.setting == summary["best"])
    write_best(settings, best.trials[0], summary["headline"])
    summary["best_adapter"] = str(trial_folder(settings, best.trials[0]) / adapter_train.ADAPTER_FILE)
    write_result(folder, summary)
    runs = {point.setting: [folder / "trials" / result.run for result in results] for point, results in measured}
    plot_first_steps(folder / "first_steps.png", runs.items())
    if settings.sweep.method != "each":
        plot_settings(folder, whole_space(settings.sweep), [(point.overrides, results) for point, results in measured])
    rows = summary.get("compared") or summary["settings"]
    columns = table_columns(rows)
    show_table(settings.run.name, columns, [[row.get(name, "") for name in columns] for row in rows])
    return summary


def write_tables(
    settings: Config, folder: Path, measured: Sequence[tuple[Point, Sequence[AdapterTrialResult]]]
) -> dict[str, Any]:
    """Write `results.parquet`, `table.md` and `comparison.md`; return what `result.json` begins with."""
    results = [result for _, of_point in measured for result in of_point]
    write_parquet(folder / "results.parquet", pa.Table.from_pylist([result.row() for result in results]))
    summary = summarize(results)
    write_table(folder / "table.md", summary["settings"])
    if name := settings.sweep.compare:
        values = {point.setting: str(point.overrides[name]) for point, _ in measured}
        summary["compared"] = compare_values(results, values)
        write_table(folder / "comparison.md", summary["compared"])
    return summary


def run_finals(
    settings: Config, folder: Path, measured: Sequence[tuple[Point, Sequence[AdapterTrialResult]]]
) -> dict[str, Any]:
    """Train the best setting of each compared value with the seeds of the finals, and measure all of them.

    Returns the tables for `result.json`, which `comparison.md` has too.
    """
    name = str(settings.sweep.compare)
    overrides = {point.setting: point.overrides for point, _ in measured}
    values = {setting: str(given[name]) for setting, given in overrides.items()}
    best = best_of_values([result for _, of_point in measured for result in of_point], values)
    finals = final_points(settings, {value: overrides[setting] for value, setting in best.items()})
    points = train_different(settings, folder, itertools.chain.from_iterable(finals.values()))
    measure_finals(settings, folder, points, _worker_resources(settings))
    return write_finals(settings, folder, finals)


def write_best(settings: Config, trial: AdapterTrial, headline: str) -> None:
    """Write `best.yaml`: adapter-train's settings of the best trial, for a run of its own beside the sweep."""
    own = trial_settings(settings, trial)
    own = replace(own, run=replace(settings.run, name=f"{settings.run.name}_best"))
    path = settings.run.folder / BEST_CONFIG
    comment = f"# rayjobs adapter-train --config {path}\n# The setting that {settings.run.name} chose: {headline}.\n"
    write_text(path, comment + dump_yaml(mask_credentials(to_dict(own))))


def run_grid(settings: Config, folder: Path) -> list[Point]:
    """Train every setting of a grid with every seed; return a point for each setting."""
    sweep = settings.sweep
    points = [
        Point(trials=[AdapterTrial(overrides, seed) for seed in sweep.seeds])
        for overrides in enumerate_overrides(sweep)
    ]
    train_different(settings, folder, points)
    return points


def train_different(settings: Config, folder: Path, points: Iterable[Point]) -> list[Point]:
    """Train the trials of points that are not over, those with equal settings once; return a point for each trial."""
    different: dict[Path, Point] = {}
    for trial in itertools.chain.from_iterable(point.trials for point in points):  # equal settings have one folder
        different.setdefault(trial_folder(settings, trial), Point(trials=[trial]))
    left = [point for point in different.values() if not results_of(settings, point)]
    if left:
        with sweep_progress(settings, different.values(), len(different)) as progress:
            run_left(settings, folder, left, left[0].trials[0], progress)
    return list(different.values())


def run_search(settings: Config, folder: Path) -> list[Point]:
    """Search for the best setting, of each value of `sweep.compare` if there is one; return what was suggested."""
    sweep, points = settings.sweep, list[Point]()
    studies = open_studies(settings, TrialChecks(settings, weights=True), points)
    with sweep_progress(settings, points, len(studies) * sweep.samples * len(sweep.seeds)) as progress:
        for study in studies:
            if study.advance():
                run_left(settings, folder, study, points[-1].trials[0], progress)
    return points


def open_studies(settings: Config, checks: TrialChecks, points: list[Point]) -> list[AdapterStudy]:
    """The studies of a search, one for each value of `sweep.compare` if there is one.

    points: the list to which each point is appended that they suggest.
    """
    sweep = settings.sweep
    compared = [{}] if sweep.compare is None else [{sweep.compare: value} for value in compared_values(sweep)]
    return [
        AdapterStudy(replace(sweep, axes=axes), fixed, checks.known_outcome, points)
        for fixed, axes in zip(compared, search_spaces(sweep), strict=True)
    ]


@contextmanager
def sweep_progress(settings: Config, points: Iterable[Point], total: int) -> Iterator[AdapterSweepProgress]:
    """Show how many of `total` trials are over while the sweep runs. `points` may still grow."""

    def read_results() -> list[AdapterTrialResult]:
        return [result for point in points for result in results_of(settings, point)]

    with Progress("tune", unit="trials", total=total, done=len(read_results())) as bar, reraise_user_errors():
        progress = AdapterSweepProgress(bar, read_results)
        progress.update()
        yield progress


def run_left(
    settings: Config,
    folder: Path,
    points: Sequence[Point] | AdapterStudy,
    first: AdapterTrial,
    progress: AdapterSweepProgress,
) -> None:
    """Run points, or a study, on the cluster.

    first: the trial whose tokens and image features are made once, before trials do it at the same time.
    """
    connect(folder, settings.run.cache_folder)
    worker = _worker_resources(settings)
    adapter_train.prepare(trial_settings(settings, first))
    train = tune.with_parameters(train_point, settings=settings, worker=worker)
    run_points(train, points, folder / "tune", settings.sweep.at_once, progress)


def _worker_resources(settings: Config) -> dict[str, float]:
    """Resources of each training worker with which the workers of all simultaneous trials fit into the cluster."""
    workers = settings.scale.workers.max * settings.sweep.at_once
    return replace(settings.scale, workers=WorkerRange(min=workers, max=workers)).resources()
