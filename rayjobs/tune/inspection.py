"""The findings of an inspection, as rows of tables and as sections of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.ensemble import ZERO_SHOT
from cafo.inspection import (
    Explanation,
    choose_next_labels,
    decompose,
    explain,
    find_confusions,
    find_near_duplicates,
    sentence_contributions,
)
from cafo.inspection.contributions import explain_block
from cafo.inspection.label_errors import LabelCheck
from rayjobs.reporting.example_gallery import mistakes_first
from rayjobs.reporting.picture_sections import Picture, PictureSection
from rayjobs.tune.inspected import Inspected, SeenImage

Row = dict[str, Any]


class Findings(NamedTuple):
    """The rows of one table, and the sections of pictures that show the first of them."""

    columns: tuple[str, ...]
    rows: list[Row]
    sections: list[PictureSection]


ERROR_COLUMNS = (
    "split",
    "path",
    "label",
    "suggested",
    "margin",
    "probability_of_label",
    "probability_of_suggested",
)
PAIR_COLUMNS = (
    "first_split",
    "first",
    "first_class",
    "second_split",
    "second",
    "second_class",
    "cosine",
    "same_content",
    "across_splits",
    "two_classes",
)
CONTRIBUTION_COLUMNS = (
    "split",
    "image",
    "class",
    "predicted",
    "rival",
    "margin",
    "kind",
    "name",
    "of_class",
    "pull",
)
NEXT_COLUMNS = ("path", "likeliest", "second", "probability", "uncertainty", "cosine_to_known")


class Sentences(NamedTuple):
    """The sentences that the classes are described by."""

    texts: Mapping[str, Sequence[str]]
    """class name → its sentences"""
    features: Sequence[Tensor]
    """(T, C) of each class, as CLIP's text encoder gives them"""


def label_errors(inspected: Inspected, checks: tuple[LabelCheck, LabelCheck], shown: int) -> Findings:
    """List the training and validation images whose own class is outvoted, the likeliest errors first."""
    rows, pictures, names = list[Row](), list[Picture](), inspected.cache.class_names
    for images, check in zip((inspected.train_images, inspected.val_images), checks, strict=True):
        probabilities = _probabilities(inspected.cache, check.logits)
        for image in check.suspects():
            seen, suggested = images[image], int(check.suggested[image])
            row: Row = {
                "split": seen.split,
                "path": seen.path,
                "label": seen.class_name,
                "suggested": names[suggested],
                "margin": round(float(check.margins[image]), 3),
                "probability_of_label": _digits(probabilities[image, names.index(seen.class_name)]),
                "probability_of_suggested": _digits(probabilities[image, suggested]),
            }
            rows.append(row)
            caption = f"labelled {row['label']}, looks like {row['suggested']} (margin {row['margin']:.1f})"
            pictures.append(Picture((seen.file,), f"{caption}; {seen.path}"))
    order = sorted(range(len(rows)), key=lambda i: rows[i]["margin"])
    note = (
        "Images whose own class is outvoted by the other images and the text, with their own keys left out; the "
        "likeliest errors first. Many of those further down are right, and only hard. All are in label_errors.csv."
    )
    section = PictureSection(title="labels that may be wrong", pictures=[pictures[i] for i in order[:shown]], note=note)
    return Findings(ERROR_COLUMNS, [rows[i] for i in order], [section])


def near_duplicates(
    images: Sequence[SeenImage], features: Mapping[str, Tensor], threshold: float, most: int, shown: int
) -> tuple[Findings, int]:
    """List the pairs of images that look alike, those across splits or classes first; and how many there are.

    Args:
        images: n images of all splits.
        features: {source: (n, C)}.
        threshold, most: those of `find_near_duplicates`.
        shown: pictures in the report.
    """
    found = find_near_duplicates(features, threshold, most=most)
    rows, pictures = [], []
    for pair in found.pairs:
        first, second = images[pair.first], images[pair.second]
        labelled = bool(first.class_name and second.class_name)
        row = {
            "first_split": first.split,
            "first": first.path,
            "first_class": first.class_name,
            "second_split": second.split,
            "second": second.path,
            "second_class": second.class_name,
            "cosine": round(pair.cosine, 5),
            "same_content": first.content == second.content,
            "across_splits": first.split != second.split,
            "two_classes": labelled and first.class_name != second.class_name,
        }
        rows.append(row)
        sides = [f"{s.split}: {s.path}" + (f" ({s.class_name})" if s.class_name else "") for s in (first, second)]
        pictures.append(Picture((first.file, second.file), f"{' = '.join(sides)}, cosine {pair.cosine:.3f}"))
    order = sorted(range(len(rows)), key=lambda i: (not rows[i]["two_classes"], not rows[i]["across_splits"]))
    note = (
        f"Pairs whose features have a cosine of at least {threshold:g} under every encoder; those of two classes come "
        f"first, then those of two splits. {found.total:,} pairs in all; see near_duplicates.csv."
    )
    section = PictureSection(title="near-duplicates", pictures=[pictures[i] for i in order[:shown]], note=note)
    return Findings(PAIR_COLUMNS, [rows[i] for i in order], [section]), found.total


def confusions(inspected: Inspected, checks: tuple[LabelCheck, LabelCheck], most: int, shown: int) -> Findings:
    """List the pairs of classes that are taken for each other on held-out images, and what pulls."""
    on_val = bool(len(inspected.val_labels))
    check, images = (checks[1], inspected.val_images) if on_val else (checks[0], inspected.train_images)
    cache, names = inspected.cache, inspected.cache.class_names
    labels = inspected.val_labels if on_val else cache.labels[inspected.train.rows]
    values = (cache.alpha, cache.beta, cache.ensemble)
    rows, pictures = [], []
    for confusion in find_confusions(check.logits, labels, inspected.held_out, values, most=most):
        pulling = [vote for vote in confusion.votes if vote.pull > 0]
        rows.append(
            {
                "label": names[confusion.label],
                "predicted": names[confusion.predicted],
                "images": len(confusion.images),
                "of": confusion.of,
                "margin": round(confusion.margin, 3),
                "text": round(confusion.text, 3),
                **{name: round(pull, 3) for name, pull in confusion.sources.items()},
                "pulled_by": "; ".join(f"{inspected.keys[v.key].path} ({v.pull:+.2f})" for v in pulling[:3]),
            }
        )
        files = [images[confusion.images[0]].file] + [inspected.keys[v.key].file for v in pulling[:1]]
        parts = ", ".join(f"{name} {pull:+.1f}" for name, pull in confusion.sources.items())
        caption = f"{names[confusion.label]} taken for {names[confusion.predicted]}: {len(confusion.images)} of "
        caption += f"{confusion.of} images; text {confusion.text:+.1f}, {parts}"
        pictures.append(Picture(tuple(files), caption))
    note = (
        "Left, an image that was taken for another class; right, the key that pulls most toward that class. "
        + ("On validation images. " if on_val else "On training images without their own keys. ")
        + "The figures are mean contributions to the difference of the two logits; see confusions.csv."
    )
    columns = ("label", "predicted", "images", "of", "margin", "text", *cache.keys, "pulled_by")
    return Findings(columns, rows, [PictureSection(title="confused classes", pictures=pictures[:shown], note=note)])


def explain_held_out(
    inspected: Inspected, checks: tuple[LabelCheck, LabelCheck], of_each: int, votes: int
) -> list[tuple[SeenImage, Explanation, Tensor]]:
    """Explain some mistakes and some right answers on held-out images; also return CLIP's features of each."""
    on_val = bool(len(inspected.val_labels))
    check, images = (checks[1], inspected.val_images) if on_val else (checks[0], inspected.train_images)
    features = inspected.val if on_val else inspected.train.features
    rows = mistakes_first(
        (check.margins < 0).nonzero()[:, 0].tolist(), (check.margins >= 0).nonzero()[:, 0].tolist(), of_each
    )
    if not rows:
        return []
    cache, part = inspected.cache, inspected.held_out(torch.tensor(rows)).load()
    found = decompose(part.zero_shot, part.affinities, part.key_labels, cache.alpha, cache.beta, cache.ensemble)
    seen = features[cache.zero_shot_source]
    return [(images[row], why, seen[row]) for row, why in zip(rows, explain_block(found, votes), strict=True)]


def explain_images(
    inspected: Inspected, images: Sequence[SeenImage], features: Mapping[str, Tensor], votes: int
) -> list[tuple[SeenImage, Explanation, Tensor]]:
    """Explain the trained cache's prediction of each image; also return CLIP's features of each."""
    seen = features[inspected.cache.zero_shot_source]
    return list(zip(images, explain(inspected.cache, features, votes), seen, strict=True))


def contributions(
    inspected: Inspected,
    explained: Sequence[tuple[SeenImage, Explanation, Tensor]],
    sentences: Sentences | None,
    shown: int,
) -> Findings:
    """List what decided between the two most likely classes of each image: text, sentences, keys, and all others.

    The rows of one image without its sentences add up to its margin, and those of its sentences to its text.
    """
    names, rows, sections = inspected.cache.class_names, list[Row](), list[PictureSection]()
    linear = inspected.cache.ensemble.baseline == ZERO_SHOT
    for image, why, features in explained:
        label, rival = names[why.label], names[why.rival]
        head: Row = {"split": image.split, "image": image.path, "class": image.class_name}
        head |= {"predicted": label, "rival": rival, "margin": round(why.margin, 4)}
        rows.append({**head, "kind": "text", "name": "", "of_class": "", "pull": round(why.text, 4)})
        lines: list[tuple[str, str, float]] = []
        if sentences and linear:
            lines = _sentence_pulls(sentences, (label, rival), (why.label, why.rival), features)
        rows += [{**head, "kind": "sentence", "name": t, "of_class": c, "pull": round(p, 4)} for t, c, p in lines]
        for vote in why.votes:
            key = {"kind": "key", "name": inspected.keys[vote.key].path, "of_class": names[vote.label]}
            rows.append({**head, **key, "pull": round(vote.pull, 4)})
        rows.append({**head, "kind": "other keys", "name": "", "of_class": "", "pull": round(why.others, 4)})
        if len(sections) < shown:
            sections.append(_explanation_section(inspected, image, why, lines))
    return Findings(CONTRIBUTION_COLUMNS, rows, sections)


def _sentence_pulls(
    sentences: Sentences, names: tuple[str, str], labels: tuple[int, int], features: Tensor
) -> list[tuple[str, str, float]]:
    """Each sentence of the two classes with what it adds to the difference of their logits, the largest first."""
    texts, lines = [sentences.features[label] for label in labels], []
    for sign, name, added in zip((1, -1), names, sentence_contributions(features[None], texts), strict=True):
        lines += [(t, name, sign * float(p)) for t, p in zip(sentences.texts[name], added[0], strict=True)]
    return sorted(lines, key=lambda line: -abs(line[2]))


def _explanation_section(
    inspected: Inspected, image: SeenImage, why: Explanation, lines: Sequence[tuple[str, str, float]]
) -> PictureSection:
    names = inspected.cache.class_names
    truth = f", labelled {image.class_name}" if image.class_name else ""
    pictures = [Picture((image.file,), f"the image: {image.path}{truth}")]
    for vote in why.votes:
        key = inspected.keys[vote.key]
        where = " generated" if key.split == "generated" else ""
        pictures.append(Picture((key.file,), f"{vote.pull:+.2f} by a{where} {names[vote.label]}; {key.path}"))
    sources = ", ".join(f"{name} {pull:+.2f}" for name, pull in why.sources.items())
    note = f"The difference of the logits is {why.margin:.2f}: text {why.text:+.2f}, {sources}."
    for name in (names[why.label], names[why.rival]):
        if best := next((line for line in lines if line[1] == name), None):
            note += f" Of the sentences of {name}, {best[0]!r} adds most ({best[2]:+.2f})."
    title = f"why {names[why.label]} and not {names[why.rival]}: {image.path}"
    return PictureSection(title=title, pictures=pictures, note=note)


def next_labels(
    inspected: Inspected, images: Sequence[SeenImage], features: Mapping[str, Tensor], count: int
) -> Findings:
    """List the unlabelled images that are worth labelling next, the most useful first."""
    cache, names = inspected.cache, inspected.cache.class_names
    probabilities = _probabilities(cache, cache.logits(features))
    labelled = {name: inspected.train.features[name] for name in features}
    rows, pictures = [], []
    for one in choose_next_labels(probabilities, features, count, labelled=labelled):
        seen = images[one.image]
        rows.append(
            {
                "path": seen.path,
                "likeliest": names[one.label],
                "second": names[one.rival],
                "probability": _digits(one.probability),
                "uncertainty": _digits(one.uncertainty),
                "cosine_to_known": round(one.cosine, 4),
            }
        )
        pictures.append(Picture((seen.file,), f"{names[one.label]} or {names[one.rival]}? {seen.path}"))
    note = "Images that the classifier is unsure of and that differ from one another; see next_labels.csv."
    return Findings(NEXT_COLUMNS, rows, [PictureSection(title="worth labelling next", pictures=pictures, note=note)])


def _probabilities(cache: Cache, logits: Tensor) -> Tensor:
    """The probabilities of the classes, calibrated if the cache was chosen on held-out images."""
    return logits.softmax(dim=1) if cache.calibration is None else cache.calibration.probabilities(logits)


def _digits(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")
