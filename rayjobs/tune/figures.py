"""Figures and example images of a sweep and of its evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cafo.held_out import on_validation
from rayjobs.data.feature_store import Features
from rayjobs.data.image_list import ImageList
from rayjobs.reporting import plots
from rayjobs.reporting.example_gallery import ORDER, mistakes_first, write_examples
from rayjobs.reporting.figures import save_plot
from rayjobs.storage.files import read_json
from rayjobs.tune.evaluation import TargetScore
from rayjobs.tune.search_space import SearchConfig
from rayjobs.tune.selection import ChosenSetting, best_choice, settings_to_plot
from rayjobs.tune.trial import SURFACE, SharedInputs, open_cache, open_classifier, write_surface


def write_search_surfaces(
    folder: Path, chosen: Sequence[ChosenSetting], shared: SharedInputs, search: SearchConfig
) -> None:
    """Write `surface.json`, the accuracy over α and β, into the folder of each trial that is plotted.

    It is made here where the choice was made on validation images; trials write their own on held-out images, and a
    choice on no image has none, and neither has a rival.
    """
    labels = torch.tensor(shared.val_labels)
    for choice in settings_to_plot(chosen):
        trial = choice.seeds[0].trial
        path = folder / "trials" / trial / SURFACE
        if path.exists() or choice.select != "val" or choice.setting.rival:
            continue
        cache = open_cache(folder / "trials", trial)
        features = {name: torch.tensor(shared.val[name]) for name in {*cache.keys, cache.zero_shot_source}}
        write_surface(path, cache, on_validation(cache, features, labels), search.grid())


def write_prediction_examples(
    folder: Path, trials: Path, chosen: Sequence[ChosenSetting], images: ImageList, features: Features
) -> None:
    """Write small copies of some test images with the predictions of the best choice."""
    best = best_choice(chosen)
    cache = open_classifier(trials, best.seeds[0].trial)
    logits = cache.logits({name: torch.tensor(features.values[name][0]) for name in cache.encoders})
    probabilities = logits.softmax(dim=1)
    predicted = probabilities.argmax(dim=1).tolist()
    items = [images.items[row] for row in features.rows]
    wrong = [i for i, item in enumerate(items) if predicted[i] != item.label]
    right = sorted(set(range(len(items))) - set(wrong))
    examples = []
    for i in mistakes_first(wrong, right):
        truth = "" if predicted[i] == items[i].label else f", not {items[i].class_name}"
        caption = f"{cache.class_names[predicted[i]]}{truth} ({probabilities[i, predicted[i]]:.0%})"
        examples.append((images.root / items[i].path, caption))
    write_examples(folder, examples, f"{best.method} at {best.shots} shots, first seed; {ORDER}")


def plot_chosen(
    folder: Path,
    trials: Path,
    chosen: Sequence[ChosenSetting],
    scores: Sequence[TargetScore],
    class_names: Sequence[str],
) -> None:
    """Plot the settings that `settings_to_plot` selects, at their first seed; the best one has number 00.

    Each has its accuracy over α and β on the images of the choice, if it was made on any. On test images it has the
    accuracy of each class, the confusion, and which source weighs most.
    """
    for number, choice in enumerate(settings_to_plot(chosen)):
        trial = choice.seeds[0]
        title = f"{choice.method}, {choice.shots} shots, seed {trial.seed}"
        (score,) = (s for s in scores if (s.method, s.shots, s.seed) == (choice.method, choice.shots, trial.seed))
        path = trials / trial.trial / SURFACE
        if trial.alpha is not None and trial.beta is not None and path.exists():
            _plot_landscape(folder, number, title, read_json(path), (trial.alpha, trial.beta))
        _plot_score(folder, number, title, score, class_names)


def _plot_landscape(folder: Path, number: int, title: str, values: dict[str, Any], chosen: tuple[float, float]) -> None:
    accuracy = [[100 * count / values["total"] for count in line] for line in values["correct"]]
    figure = plots.search_landscape(values["alphas"], values["betas"], accuracy, chosen)
    title_of_plot = "accuracy over α and β, on the images of the choice"
    save_plot(folder / f"landscape-{number:02d}.png", title_of_plot, figure, group=title, folded=number > 0)


def _plot_score(folder: Path, number: int, title: str, score: TargetScore, class_names: Sequence[str]) -> None:
    group: dict[str, Any] = {"group": title, "folded": number > 0}
    images = score.confusion.sum(axis=1)
    accuracy = (100 * score.confusion.diagonal() / images.clip(min=1)).tolist()
    figure = plots.class_accuracy(class_names, accuracy)
    save_plot(folder / f"classes-{number:02d}.png", "accuracy of each class on test", figure, **group)
    figure = plots.confusion(class_names, score.confusion.tolist())
    save_plot(folder / f"confusion-{number:02d}.png", "confusion on test", figure, **group)
    if len(score.winning_sources) > 1:
        percent = {
            source: [100 * count / max(total, 1) for count, total in zip(counts, images, strict=True)]
            for source, counts in score.winning_sources.items()
        }
        figure = plots.winning_sources(class_names, percent)
        save_plot(folder / f"sources-{number:02d}.png", "which source weighs most on test", figure, **group)
