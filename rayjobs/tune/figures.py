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
from rayjobs.reporting.picture_sections import Picture, PictureSection, write_picture_sections
from rayjobs.storage.files import read_object
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


GALLERY_CLASSES, OF_EACH = 30, 3
"""Classes that have a gallery of their own, those with the most mistakes; wrong and right images of each."""


def write_prediction_examples(
    folder: Path, trials: Path, chosen: Sequence[ChosenSetting], images: ImageList, features: Features
) -> None:
    """Write small copies of some test images with the predictions of the best choice, over all and by class."""
    best = best_choice(chosen)
    cache = open_classifier(trials, best.seeds[0].trial)
    logits = cache.logits({name: torch.tensor(features.values[name][0]) for name in cache.encoders})
    probabilities, predicted = (values.tolist() for values in logits.softmax(dim=1).max(dim=1))
    items = [images.items[row] for row in features.rows]

    def picture(i: int) -> Picture:
        truth = "" if predicted[i] == items[i].label else f", not {items[i].class_name}"
        caption = f"{cache.class_names[predicted[i]]}{truth} ({probabilities[i]:.0%})"
        return Picture((images.root / items[i].path,), caption)

    wrong = [i for i, item in enumerate(items) if predicted[i] != item.label]
    right = sorted(set(range(len(items))) - set(wrong))
    of_whom = f"{best.method} at {best.shots} shots, first seed"
    shown = [(each.files[0], each.caption) for each in map(picture, mistakes_first(wrong, right))]
    write_examples(folder, shown, f"{of_whom}; {ORDER} In brackets is the probability of the prediction.")
    by_class: dict[int, tuple[list[int], list[int]]] = {}
    for i in (*wrong, *right):
        by_class.setdefault(items[i].label, ([], []))[int(predicted[i] == items[i].label)].append(i)
    hardest = sorted(by_class, key=lambda label: (-len(by_class[label][0]), label))[:GALLERY_CLASSES]
    sections = [
        PictureSection(
            title=f"{cache.class_names[label]}: {len(by_class[label][1])} of {sum(map(len, by_class[label]))} right",
            pictures=[picture(i) for i in mistakes_first(*by_class[label], of_each=OF_EACH)],
            group=f"test images by class, {of_whom}",
        )
        for label in hardest
    ]
    write_picture_sections(folder, sections)


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
            _plot_landscape(folder, number, title, read_object(path), (trial.alpha, trial.beta))
        _plot_score(folder, number, title, score, class_names)


def _plot_landscape(folder: Path, number: int, title: str, values: dict[str, Any], chosen: tuple[float, float]) -> None:
    drawing = plots.search_landscape(values["alphas"], values["betas"], values["correct"], values["total"], chosen)
    title_of_plot = "accuracy over α and β, on the images of the choice"
    save_plot(folder / f"landscape-{number:02d}.png", title_of_plot, drawing, group=title, folded=number > 0)


def _plot_score(folder: Path, number: int, title: str, score: TargetScore, class_names: Sequence[str]) -> None:
    group: dict[str, Any] = {"group": title, "folded": number > 0}
    images = score.confusion.sum(axis=1).tolist()
    drawing = plots.class_accuracy(class_names, score.confusion.diagonal().tolist(), images)
    save_plot(folder / f"classes-{number:02d}.png", "accuracy of each class on test", drawing, **group)
    drawing = plots.confusion(class_names, score.confusion.tolist())
    save_plot(folder / f"confusion-{number:02d}.png", "confusion on test", drawing, **group)
    if len(score.winning_sources) > 1:
        drawing = plots.winning_sources(class_names, images, score.winning_sources)
        save_plot(folder / f"sources-{number:02d}.png", "which source weighs most on test", drawing, **group)
