"""Explain a chosen cache and check its data: what decides, which labels may be wrong, what to label next.

Reads a finished run of cafo-tune or cafo, and writes into its subfolder `inspect`: `report.html` with pictures, and a
CSV file for each kind of finding. Every logit is a sum over p_ZS and the keys, so the explanations are exact. Test
images stay unread unless `test` asks for them, and their labels are never used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cafo.datasets import Dataset
from rayjobs.cluster.ray_init import connect
from rayjobs.config import replace_paths
from rayjobs.console import show_result, show_table
from rayjobs.data.feature_store import Features, FeatureStore, open_encoders
from rayjobs.data.image_dataset import log_notices
from rayjobs.data.image_list import ImageList, plain_list, unlabelled_list
from rayjobs.data.rejected import write_rejected
from rayjobs.data.text_classifier import prepare_classifier
from rayjobs.job_configs.cafo_inspect import Config
from rayjobs.jobs import cafo_eval, cafo_tune
from rayjobs.lifecycle import job
from rayjobs.reporting.picture_sections import PictureSection, write_picture_sections
from rayjobs.reporting.tables import write_csv
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.hub import pin
from rayjobs.tune import inspection
from rayjobs.tune.identity import check_same_caches, check_same_inputs
from rayjobs.tune.inspected import Inspected, SeenImage, gather, pick_choice
from rayjobs.tune.inspection import Findings
from rayjobs.tune.selection import ChosenSetting
from rayjobs.tune.trial import open_cache

SUBFOLDER = "inspect"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An inspection that can be made: its settings, the sweep's, and the trial that is inspected."""

    JOB: ClassVar = Config.JOB

    settings: Config
    swept: cafo_tune.Config
    choice: ChosenSetting
    trial: str

    @property
    def run(self) -> RunConfig:
        """The inspection's own run, in a subfolder of the sweep's."""
        sweep = self.swept.run
        return RunConfig(name=SUBFOLDER, storage=str(sweep.folder), cache=str(sweep.cache_folder), track=sweep.track)

    @property
    def seed(self) -> int:
        """The seed of the inspected trial."""
        return next(trial.seed for trial in self.choice.seeds if trial.trial == self.trial)


def check(settings: Config) -> Inspection:
    """Read what the sweep has chosen. Raises ConfigError if it has not chosen yet, or no cache as it is asked for."""
    evaluation = cafo_eval.check(cafo_eval.Config(sweep=settings.sweep, scale=settings.scale))
    choice, trial = pick_choice(evaluation.chosen, shots=settings.shots, method=settings.method, seed=settings.seed)
    return Inspection(settings=settings, swept=evaluation.swept, choice=choice, trial=trial)


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    found = check(settings)
    choice, lists = found.choice, _lists(settings, found.swept.data.open())
    rows = [
        ["sweep", settings.sweep],
        ["cache", f"{choice.method} at {choice.shots} shots, seed {found.seed}"],
        ["encoders", ", ".join(choice.setting.encoders)],
        *([name, f"{len(images.items)} images"] for name, images in lists.items()),
        ["written into", str(found.run.folder)],
    ]
    show_table("plan", ["", ""], rows)


def run(settings: Config) -> dict[str, Any]:
    """Inspect the cache; return and write `inspect/result.json`, with CSV files and the report beside it."""
    return inspect(check(replace_paths(settings, pin)))


@job
def inspect(found: Inspection) -> dict[str, Any]:
    """Inspect the cache; see `run`."""
    settings, swept, choice = found.settings, found.swept, found.choice
    dataset, tried = cafo_tune.check(swept)
    lists = _lists(settings, dataset)
    encoders = cafo_tune.open_used_encoders(swept, tried)
    folder = open_run(found.run, settings)
    connect(folder, found.run.cache_folder)
    inputs = cafo_tune.prepare_inputs(swept, dataset, tried, encoders, plain=True)
    check_same_inputs(swept.run.folder, inputs)
    trials = swept.run.folder / "trials"
    check_same_caches(trials, [found.trial], dataset.class_names, inputs.identities)
    inspected = gather(inputs, choice, open_cache(trials, found.trial), found.seed)
    del inputs
    extra = _encode(found, lists)
    rejected = [image for features in extra.values() for image in features.rejected]
    write_rejected(folder, (image._asdict() for image in rejected))

    findings, total_pairs = _find(found, dataset, inspected, lists, extra)
    for name, of_kind in findings.items():
        cells = [[row.get(column, 0.0) for column in of_kind.columns] for row in of_kind.rows]
        write_csv(folder / f"{name}.csv", of_kind.columns, cells)
    sections: list[PictureSection] = [section for of_kind in findings.values() for section in of_kind.sections]
    write_picture_sections(folder, sections)
    result = _summarize(found, findings, total_pairs, lists, len(rejected))
    write_result(folder, result)
    show_result(f"{swept.run.name}/{SUBFOLDER}", {k: v for k, v in result.items() if not isinstance(v, list)})
    return result


def _lists(settings: Config, dataset: Dataset) -> dict[str, ImageList]:
    """The images besides the sweep's own, by role. Those of the test split have lost their labels here already."""
    lists = {}
    if settings.images:
        lists["images"] = unlabelled_list("images", settings.images)
    if settings.unlabelled:
        lists["unlabelled"] = unlabelled_list("unlabelled", settings.unlabelled)
    if settings.test:
        test = plain_list(
            "test", dataset.image_root, [item._replace(label=0, class_name="") for item in dataset.open_test()]
        )
        lists |= {"test": test} if test.items else {}
    return lists


def _encode(found: Inspection, lists: Mapping[str, ImageList]) -> dict[str, Features]:
    """Encode the images besides the sweep's own, or read their features."""
    if not lists:
        return {}
    store = FeatureStore(
        encoders=open_encoders({name: found.swept.encoders[name] for name in found.choice.setting.encoders}),
        settings=found.swept.features,
        cache=found.run.cache_folder,
        workers=found.settings.scale.workers.max,
        resources=found.settings.scale.resources(),
    )
    return store.load(list(lists.values()))


def _find(
    found: Inspection,
    dataset: Dataset,
    inspected: Inspected,
    lists: Mapping[str, ImageList],
    extra: Mapping[str, Features],
) -> tuple[dict[str, Findings], int]:
    """All findings by the name of their file, and the number of near-duplicates."""
    settings, shown = found.settings, found.settings.shown
    seen = {role: _seen(lists[role], features) for role, features in extra.items()}
    values = {role: {n: torch.from_numpy(v[0]) for n, v in features.values.items()} for role, features in extra.items()}
    checks = inspected.check_labels()
    duplicates, total = _duplicates(settings, inspected, seen, values)
    if "images" in extra:
        explained = inspection.explain_images(inspected, seen["images"], values["images"], settings.votes)
    else:
        explained = inspection.explain_held_out(inspected, checks, max(1, shown // 3), settings.votes)
    findings = {
        "label_errors": inspection.label_errors(inspected, checks, shown),
        "near_duplicates": duplicates,
        "confusions": inspection.confusions(inspected, checks, most=50, shown=shown),
        "contributions": inspection.contributions(inspected, explained, _sentences(found, dataset), shown),
    }
    if "unlabelled" in extra:
        findings["next_labels"] = inspection.next_labels(
            inspected, seen["unlabelled"], values["unlabelled"], settings.next_labels
        )
    return findings, total


def _duplicates(
    settings: Config,
    inspected: Inspected,
    seen: Mapping[str, Sequence[SeenImage]],
    values: Mapping[str, Mapping[str, Tensor]],
) -> tuple[Findings, int]:
    """Compare the training, validation and, if they are there, test images with one another."""
    images = [*inspected.train_images, *inspected.val_images, *seen.get("test", [])]
    parts = [inspected.train.features, inspected.val, values.get("test", {})]
    features = {name: torch.cat([part[name] for part in parts if part]) for name in inspected.cache.keys}
    threshold, most = settings.duplicate_cosine, settings.most_duplicates
    return inspection.near_duplicates(images, features, threshold, most, settings.shown)


def _sentences(found: Inspection, dataset: Dataset) -> inspection.Sentences:
    """The sentences of the inspected cache, and their features."""
    setting = found.choice.setting
    encoder = open_encoders({setting.encoders[0]: found.swept.encoders[setting.encoders[0]]})[setting.encoders[0]]
    texts = found.swept.data.sentences(dataset, setting.sentences)
    resources, cache = found.settings.scale.resources(), found.run.cache_folder
    classifier = prepare_classifier(encoder, texts, dataset.class_names, cache, resources, each=True)
    assert classifier.embeddings is not None
    counts = [len(texts[name]) for name in dataset.class_names]
    features = [of_class[:count] for of_class, count in zip(classifier.embeddings, counts, strict=True)]
    return inspection.Sentences({name: texts[name] for name in dataset.class_names}, features)


def _seen(images: ImageList, features: Features) -> list[SeenImage]:
    return [
        SeenImage(images.role, images.root, images.items[row].path, "", features.contents[row] or "")
        for row in features.rows
    ]


def _summarize(
    found: Inspection,
    findings: Mapping[str, Findings],
    total_pairs: int,
    lists: Mapping[str, ImageList],
    rejected: int,
) -> dict[str, Any]:
    """The figures of `result.json`, with the first rows of each table."""
    pairs, choice = findings["near_duplicates"].rows, found.choice
    across = sum(row["across_splits"] for row in pairs)
    wrong, confused = len(findings["label_errors"].rows), len(findings["confusions"].rows)
    notices = []
    if "test" in lists:
        notices.append(
            f"{len(lists['test'].items)} test images were compared by their features; no label of them was used"
        )
    if total_pairs > len(pairs):
        notices.append(f"only the nearest {len(pairs)} of {total_pairs} near-duplicates are listed")
    shown = {
        name: of_kind.rows[: found.settings.shown] for name, of_kind in findings.items() if name != "contributions"
    }
    return {
        "headline": f"{wrong} labels that may be wrong, {total_pairs} near-duplicates ({across} across splits), "
        f"{confused} confused pairs of classes",
        "cache": f"{choice.method} at {choice.shots} shots, seed {found.seed}",
        "possible_label_errors": wrong,
        "near_duplicate_pairs": total_pairs,
        "across_splits": across,
        "confused_pairs": confused,
        "rejected_images": rejected,
        **shown,
        **log_notices(notices),
    }
