"""The finder of wrong labels leaves exactly an image's own key out, and finds labels that were flipped."""

import math

import pytest
import torch
from torch.nn import functional as F

from cafo.cache import Cache
from cafo.cross_fit import TrainingImages
from cafo.ensemble import Ensemble
from cafo.inspection.label_errors import check_training_labels

CLASSES, WIDTH = 5, 17


def make_images(each: int, spread: float = 0.6) -> tuple[Cache, TrainingImages]:
    rng = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(CLASSES, WIDTH, generator=rng), dim=1)
    labels = torch.arange(CLASSES * each) % CLASSES
    features = F.normalize(centres[labels] + spread * torch.randn(len(labels), WIDTH, generator=rng) / 4, dim=1)
    cache = Cache(
        keys={"clip": features},
        labels=labels,
        classifier=F.normalize(centres.T + 0.2 * torch.randn(WIDTH, CLASSES, generator=rng), dim=0),
        class_names=tuple("abcde"),
        alpha=40.0,
    )
    return cache, TrainingImages(features={"clip": features}, rows=torch.arange(len(labels)))


def test_margins_are_those_of_caches_without_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, images = make_images(4)
    monkeypatch.setattr("cafo.inspection.label_errors._FLOATS_AT_ONCE", 3 * len(cache.labels))
    check = check_training_labels(cache, images)
    for row, label in enumerate(cache.labels.tolist()):
        rest = [r for r in range(len(cache.labels)) if r != row]
        others = Cache(
            keys={"clip": cache.keys["clip"][rest]},
            labels=cache.labels[rest],
            classifier=cache.classifier,
            class_names=cache.class_names,
            alpha=cache.alpha,
        )
        logits = others.logits({"clip": images.features["clip"][row : row + 1]})[0]
        best = max((n for n in range(CLASSES) if n != label), key=lambda n: float(logits[n]))
        assert int(check.suggested[row]) == best
        assert float(check.margins[row]) == pytest.approx(float(logits[label] - logits[best]), abs=1e-3)


def test_flipped_labels_come_first_and_their_true_class_is_suggested() -> None:
    cache, images = make_images(9, spread=0.3)
    truth, flipped = cache.labels.clone(), [3, 17, 31]
    cache.labels[flipped] = (truth[flipped] + 2) % CLASSES
    check = check_training_labels(cache, images)
    suspects = check.suspects()
    assert sorted(suspects[:3]) == flipped
    assert check.suggested[flipped].equal(truth[flipped])
    assert check.margins[suspects].tolist() == sorted(check.margins[suspects].tolist())


def test_an_image_alone_in_its_class_is_not_judged() -> None:
    cache, images = make_images(2)
    cache.labels[CLASSES] = 1  # the first class has one image left
    check = check_training_labels(cache, images)
    assert check.judged.tolist() == [False] + [True] * 9
    assert math.isnan(float(check.margins[0]))
    assert 0 not in check.suspects()


def test_a_copy_of_an_image_does_not_vote_for_its_label() -> None:
    cache, images = make_images(3, spread=0.3)
    wrong, copy = 0, CLASSES
    for tensor in (cache.keys["clip"], images.features["clip"]):
        tensor[copy] = tensor[wrong]
    cache.labels[[wrong, copy]] = 4
    groups = torch.arange(len(cache.labels))
    alone = Cache(**{**vars(cache), "ensemble": Ensemble(baseline="nothing")})
    blind = check_training_labels(alone, images)
    groups[copy] = wrong
    check = check_training_labels(alone, TrainingImages(features=images.features, rows=images.rows, groups=groups))
    assert {wrong, copy} & set(blind.suspects()) == set()
    assert {wrong, copy} <= set(check.suspects())
