"""Open the test split once and score the settings that a cafo-tune sweep has chosen.

Writes accuracies by seed and by class, confusions and, for each of `targets`, the accuracy under distribution shift. A
sweep whose test split was opened for another choice is refused.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cafo.dataset_checks import class_changes
from cafo.datasets import Dataset
from cafo.methods.base import reads_unprojected
from rayjobs.cluster.ray_init import connect
from rayjobs.config import load, replace_paths, to_dict
from rayjobs.console import show_table
from rayjobs.data.feature_store import Features, FeatureStore, open_encoders
from rayjobs.data.image_dataset import ImageDatasetConfig, log_notices
from rayjobs.data.image_list import ImageList, plain_list
from rayjobs.data.rejected import write_rejected
from rayjobs.errors import ConfigError, DataError
from rayjobs.job_configs.cafo_eval import Config
from rayjobs.jobs import cafo_tune
from rayjobs.lifecycle import job
from rayjobs.models.encoder import EncoderInfo
from rayjobs.reporting import plots
from rayjobs.reporting.accuracy_tables import (
    ColumnsAndLines,
    accuracy_table,
    published_rows,
    write_tables,
)
from rayjobs.reporting.figures import save_plot
from rayjobs.reporting.paired_differences import differences_table
from rayjobs.reporting.tables import accuracy_cell
from rayjobs.runs.record import start_run, write_result
from rayjobs.runs.run_dir import CONFIG_FILE, RunConfig
from rayjobs.storage.files import read_object
from rayjobs.storage.hub import pin
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.yaml_file import read_yaml
from rayjobs.tune.evaluation import TargetScore, check_opening, record_opening, score_target, write_scores
from rayjobs.tune.figures import plot_chosen, write_prediction_examples
from rayjobs.tune.identity import check_same_caches
from rayjobs.tune.images import SweepImage, duplicate_notices, read_images
from rayjobs.tune.rivals import open_rivals
from rayjobs.tune.selection import (
    CHOSEN,
    SWEEP,
    ChosenSetting,
    best_choice,
    check_reference,
    read_chosen,
    reference_method,
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation that can be made: its settings, those of the sweep, and the settings that the sweep has chosen."""

    JOB: ClassVar = Config.JOB

    settings: Config
    swept: cafo_tune.Config
    chosen: list[ChosenSetting]

    @property
    def run(self) -> RunConfig:
        """The sweep's run, as which the evaluation is recorded and tracked."""
        return self.swept.run


def check(settings: Config) -> Evaluation:
    """Read what the sweep has chosen. Raises ConfigError if it has not chosen yet, or for an unknown reference."""
    folder = resolve_path(settings.sweep)
    if not (folder / SWEEP).is_file():
        raise ConfigError(f"{folder} is no run of cafo-tune: there is no {SWEEP}")
    if not (folder / CHOSEN).is_file():
        raise ConfigError(f"{folder} has not chosen yet, and test is not for choosing: run cafo-tune to its end first")
    swept = load(cafo_tune.Config, {**read_object(folder / SWEEP), "run": to_dict(_read_run(folder))})
    chosen = read_chosen(folder)
    check_reference(settings.reference, (choice.method for choice in chosen))
    return Evaluation(settings=settings, swept=swept, chosen=chosen)


def _read_run(folder: Path) -> RunConfig:
    """The run of a sweep's folder; the folder's config.yaml names its cache and trackers."""
    saved = folder / CONFIG_FILE
    recorded = read_yaml(saved).get("run", {}) if saved.is_file() else {}
    return RunConfig(**{**recorded, "name": folder.name, "storage": str(folder.parent)})


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    evaluation = check(settings)
    rows = [["sweep", settings.sweep], ["targets", ", ".join(["test", *settings.targets])]]
    rows += [[f"{choice.shots} shots", f"{choice.method}: {len(choice.seeds)} seeds"] for choice in evaluation.chosen]
    show_table("plan", ["", ""], [*rows, ["encoders", ", ".join(evaluation.swept.encoders)]])


def run(settings: Config) -> dict[str, Any]:
    """Score the chosen caches and rivals; return and write `test/result.json`, with tables beside it."""
    return score(check(replace_paths(settings, pin)))


@job
def score(evaluation: Evaluation) -> dict[str, Any]:
    """Score the chosen classifiers on the test images of all targets; see `run`."""
    settings, swept, chosen = evaluation.settings, evaluation.swept, evaluation.chosen
    run_folder = swept.run.folder
    folder, trials = run_folder / "test", run_folder / "trials"
    check_opening(folder, chosen)
    targets = open_targets(swept.data.open(), settings.targets)
    own, own_dataset = next(iter(targets.items()))
    lists = {name: plain_list(name, dataset.image_root, dataset.open_test()) for name, dataset in targets.items()}
    encoders = _open_used(swept, chosen)
    identities = {name: encoder.identity for name, encoder in encoders.items()}
    names = (trial.trial for choice in chosen for trial in choice.seeds)
    check_same_caches(trials, names, own_dataset.class_names, identities)
    connect(run_folder, swept.run.cache_folder)
    resources = settings.scale.resources()  # workers that can never run are refused before test is opened
    start_run(run_folder, settings.JOB)
    record_opening(folder, chosen, list(targets))

    store = FeatureStore(
        encoders=encoders,
        settings=swept.features,
        cache=swept.run.cache_folder,
        workers=settings.scale.workers.max,
        resources=resources,
    )
    features = store.load(list(lists.values()))
    rejected = [image for of_target in features.values() for image in of_target.rejected]
    write_rejected(folder, (image._asdict() for image in rejected))

    scores = {name: score_target(chosen, trials, lists[name], features[name]) for name in targets}
    write_scores(folder, [score for of_target in scores.values() for score in of_target], own_dataset)

    chosen_settings = [choice.setting._asdict() for choice in chosen]
    paper = {name: published_rows(own, name, swept.encoders, chosen_settings) for name in targets}
    tables = {name: accuracy_table([s.row() for s in scores[name]], paper[name]) for name in targets}
    differences = _differences(scores, settings.reference or reference_method(chosen))
    write_tables(folder, tables, differences)
    if settings.plots:
        _plot_shots(folder, scores, paper)
        plot_chosen(folder, trials, chosen, scores[own], own_dataset.class_names)
        write_prediction_examples(folder, trials, chosen, lists[own], features[own])
    result = {
        **_headline(own, scores[own], chosen),
        "test_images": {name: len(of_target.rows) for name, of_target in features.items()},
        "rejected_images": len(rejected),
        "tables": _by_line(tables),
        "differences": _by_line(differences),
        **log_notices([*own_dataset.notices, *find_leaks(run_folder, lists, features)]),
    }
    write_result(folder, result)
    for name, (columns, lines) in tables.items():
        show_table(f"{name}: test accuracy, %", columns, lines)
    for title, (columns, lines) in differences.items():
        show_table(title, columns, lines)
    return result


def _differences(scores: Mapping[str, Sequence[TargetScore]], reference: str | None) -> dict[str, ColumnsAndLines]:
    """The differences of all methods from one on each target, by title; none where there is nothing to compare."""
    if reference is None:
        return {}
    rows = {name: [score.row() for score in of_target] for name, of_target in scores.items()}
    tables = {
        f"{name}: difference from {reference}, in points with 95% intervals": differences_table(of_target, reference)
        for name, of_target in rows.items()
        if any(row["method"] != reference and row["shots"] is not None for row in of_target)
    }
    return {title: (columns, lines) for title, (columns, lines) in tables.items() if lines}


def _by_line(tables: Mapping[str, ColumnsAndLines]) -> dict[str, dict[str, dict[str, str]]]:
    """Tables as `result.json` has them: {title: {first cell of a line: {column: cell}}}."""
    return {
        name: {line[0]: dict(zip(columns[1:], line[1:], strict=True)) for line in lines}
        for name, (columns, lines) in tables.items()
    }


def open_targets(own: Dataset, others: Mapping[str, ImageDatasetConfig]) -> dict[str, Dataset]:
    """The data sets to score, by name; the sweep's own comes first.

    Raises ConfigError or DataError for a target with the sweep's own name, with other classes, or without test images.
    """
    if own.name in others:
        raise ConfigError(f"targets.{own.name} has the name of the data set itself: call it otherwise")
    targets = {own.name: own, **{name: target.open() for name, target in others.items()}}
    for name, target in targets.items():
        if change := class_changes(own.class_names, target.class_names):
            raise DataError(f"targets.{name} has other classes than {own.name} ({change})")
        if not target.open_test():
            raise DataError(f"{name} has no test image, and an evaluation needs some")
    return targets


def _open_used(swept: cafo_tune.Config, chosen: Sequence[ChosenSetting]) -> dict[str, EncoderInfo]:
    """The encoders that the chosen caches and rivals use, with the features before a projection that rivals read."""
    rivals = open_rivals(swept.space)
    settings = [choice.setting for choice in chosen if choice.setting.rival]
    unprojected = {setting.encoders[0] for setting in settings if reads_unprojected(rivals[setting.rival])}
    return open_encoders({name: swept.encoders[name] for name in used_encoders(chosen)}, unprojected)


def used_encoders(chosen: Sequence[ChosenSetting]) -> list[str]:
    """The encoders that the chosen caches and rivals use, each once."""
    return list(dict.fromkeys(name for choice in chosen for name in choice.setting.encoders))


def find_leaks(folder: Path, lists: Mapping[str, ImageList], features: Mapping[str, Features]) -> list[str]:
    """Sentences about test images that are, by content, images that the sweep was trained or chosen on."""
    seen = read_images(folder)
    notices: list[str] = []
    for name, images in lists.items():
        readable = [(images.items[row], features[name].contents[row] or "") for row in features[name].rows]
        test = [SweepImage(f"{name}'s test", item.class_name, item.path, content) for item, content in readable]
        notices += duplicate_notices(test, seen)
    return notices


def _headline(target: str, scores: Sequence[TargetScore], chosen: Sequence[ChosenSetting]) -> dict[str, Any]:
    best = best_choice(chosen)
    of_best = [score for score in scores if (score.method, score.shots) == (best.method, best.shots)]
    accuracies = [score.accuracy for score in of_best]
    told = accuracy_cell(accuracies, of_best[0].images, unit="%")
    zero_shot = max(score.accuracy for score in scores if score.shots is None)
    return {
        "headline": f"{told} on {target}'s test with {best.method} at {best.shots} shots",
        "test_accuracy": round(100 * statistics.mean(accuracies), 2),
        "zero_shot_accuracy": round(100 * zero_shot, 2),
    }


def _plot_shots(
    folder: Path,
    scores: Mapping[str, Sequence[TargetScore]],
    paper: Mapping[str, dict[str, dict[int, float]]],
) -> None:
    """Write `shots-TARGET.png` for each target: the accuracy of every method over shots."""
    for name, of_target in scores.items():
        accuracies = plots.Accuracies.of_rows([score.row() for score in of_target])
        drawing = plots.accuracy_over_shots({"": accuracies}, paper[name])
        save_plot(folder / f"shots-{name}.png", f"accuracy over shots, {name}'s test", drawing)
