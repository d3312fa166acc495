"""Held-out training images are predicted as by a cache that was really made without them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cafo.cache import Cache
from cafo.calibration import free_temperature_loss
from cafo.cross_fit import TrainingImages, cross_fit, leave_one_out, stratified_folds
from cafo.ensemble import Ensemble
from cafo.key_training import KeyTrainer, KeyTraining
from cafo.search import search
from cafo.search_grid import BetaGrid
from cafo.spill import Spill
from tests.cafo import reference

N, VIEWS, GENERATED = 7, 3, 5


def problem(seed=0):
    """A cache of 3 keys a class, of which the last 5 keys are of generated images; views; plain features."""
    keys, _, classifier, labels, _ = reference.problem(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(len(labels), generator=rng)
    labels = labels[order]
    plain = {name: k[order] for name, k in keys.items()}
    views = {
        name: F.normalize(p + 0.3 * torch.randn(VIEWS, *p.shape, generator=rng), dim=-1) for name, p in plain.items()
    }
    cache = Cache(
        keys={name: F.normalize(v.mean(0), dim=-1) for name, v in views.items()},
        labels=labels,
        classifier=classifier,
        class_names=tuple("abcdefg"),
        alpha=0.8,
        beta=4.0,
    )
    rows = torch.arange(len(labels) - GENERATED)
    images = TrainingImages(features={name: p[rows] for name, p in plain.items()}, rows=rows)
    return cache, views, images


def without(cache, views, gone):
    """The cache and views of the other images, really removed."""
    kept = [row for row in range(len(cache.labels)) if row not in gone]
    keys = {name: k[kept] for name, k in cache.keys.items()}
    return replace(cache, keys=keys, labels=cache.labels[kept]), {name: v[:, kept] for name, v in views.items()}


def images_with_others(cache, rows):
    return [row for row in rows.tolist() if int((cache.labels == cache.labels[row]).sum()) > 1]


@pytest.mark.parametrize("ensemble", [Ensemble(), Ensemble(rule="average"), Ensemble(sources=("dino",))])
def test_leave_one_out_is_the_cache_without_the_image_and_its_views(ensemble):
    cache, views, images = problem()
    cache = replace(cache, ensemble=ensemble)
    held_out = leave_one_out(cache, images)
    got = held_out.combine(cache.beta, ensemble).logits(cache.alpha)
    rows = images_with_others(cache, images.rows)
    assert len(got) == len(rows) > 10
    for row, logits, label in zip(rows, got, held_out.labels, strict=True):
        smaller, _ = without(cache, views, {row})
        expected = smaller.logits({name: f[row : row + 1] for name, f in images.features.items()})[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert label == cache.labels[row]


def test_images_of_equal_content_do_not_see_each_other():
    cache, views, images = problem(2)
    first, second = (cache.labels == cache.labels[0]).nonzero()[:2, 0].tolist()
    assert second < len(images.rows)
    groups = torch.arange(len(cache.labels))
    groups[second] = first
    twins = replace(images, groups=groups)
    held_out = leave_one_out(cache, twins)
    at = images_with_others(cache, images.rows).index(first)
    smaller, _ = without(cache, views, {first, second})
    expected = smaller.logits({name: f[first : first + 1] for name, f in images.features.items()})[0]
    got = held_out.combine(cache.beta, cache.ensemble).logits(cache.alpha)[at]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    folds = stratified_folds(cache.labels, groups, 3, 0)
    assert folds[first] == folds[second] >= 0


def test_a_generated_image_of_equal_content_is_held_out_too():
    cache, views, images = problem(2)
    groups, twin = torch.arange(len(cache.labels)), len(cache.labels) - 1
    groups[twin] = 0
    held_out, _ = cross_fit(cache, views, replace(images, groups=groups), KeyTraining(epochs=0), 3, "loss")
    unseen = held_out.load().affinities["clip"] == -torch.inf
    assert unseen[0].any()
    assert torch.equal(unseen[twin], unseen[0])


def test_an_image_that_is_alone_in_its_class_is_not_held_out():
    cache, views, images = problem()
    label = int(cache.labels[0])
    gone = {row for row, other in enumerate(cache.labels.tolist()) if row and other == label}
    cache, views = without(cache, views, gone)
    kept = torch.tensor([row for row in images.rows.tolist() if row not in gone])
    images = TrainingImages(features={n: f[kept] for n, f in images.features.items()}, rows=torch.arange(len(kept)))
    rows = images_with_others(cache, images.rows)
    assert 0 not in rows
    crossed, _ = cross_fit(cache, views, images, KeyTraining(epochs=1), 3, "loss")
    alone = leave_one_out(cache, images)
    assert alone.labels.tolist() == cache.labels[rows].tolist()
    assert label not in crossed.labels.tolist()


def test_folds_are_stratified_and_even():
    labels = torch.tensor([0] * 13 + [1] * 7 + [2] * 2 + [3])
    folds = stratified_folds(labels, torch.arange(23), 5, seed=1)
    assert folds[-1] == -1
    for label, count in ((0, 13), (1, 7), (2, 2)):
        sizes = torch.bincount(folds[labels == label], minlength=5)
        assert sizes.sum() == count
        assert sizes.max() - sizes.min() <= 1
    sizes = torch.bincount(folds[:-1], minlength=5)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(folds, stratified_folds(labels, torch.arange(23), 5, seed=1))
    assert not torch.equal(folds, stratified_folds(labels, torch.arange(23), 5, seed=2))
    assert int(stratified_folds(labels[:22], torch.arange(22), 99, seed=1).max()) == 12
    assert stratified_folds(torch.arange(4), torch.arange(4), 5, seed=0).tolist() == [-1] * 4


@pytest.mark.parametrize("epochs", [0, 4])
def test_cross_fit_is_training_without_each_fold(epochs):
    cache, views, images = problem(4)  # whose best epoch is neither the first nor the last
    training = KeyTraining(epochs=epochs, lr=0.05, batch=5, seed=11)
    reports = []
    held_out, best = cross_fit(cache, views, images, training, 3, "loss", reports.append)
    labels = cache.labels[images.rows]
    folds = stratified_folds(labels, images.rows, 3, 11)
    assert len(reports) == epochs + 1
    for number in range(epochs + 1):
        parts = []
        for fold in range(3):
            rows = (folds == fold).nonzero()[:, 0]
            smaller, smaller_views = without(cache, views, set(rows.tolist()))
            trained = smaller
            if number:
                trainer = KeyTrainer(smaller, smaller_views, smaller.labels, training)
                for _ in range(number):
                    trainer.run_epoch()
                trained = trainer.cache
            logits = trained.logits({name: f[rows] for name, f in images.features.items()})
            parts.append((logits, labels[rows]))
        logits, of_parts = (torch.cat(list(both)) for both in zip(*parts, strict=True))
        assert reports[number].accuracy == pytest.approx(int((logits.argmax(1) == of_parts).sum()) / len(of_parts))
        assert reports[number].held_out_loss == pytest.approx(float(free_temperature_loss(logits, of_parts)), rel=1e-3)
        if number == best.epoch:
            got = held_out.combine(cache.beta, cache.ensemble).logits(cache.alpha)
            torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-3)
            assert torch.equal(held_out.labels, of_parts)
    assert best.held_out_loss == min(epoch.held_out_loss for epoch in reports)
    assert best.epoch == epochs / 2


def test_the_search_on_held_out_images_is_exact():
    """An affinity of -inf passes through the grid's multiplications: every count is that of the naive formula."""
    cache, _, images = problem(4)
    held_out = leave_one_out(cache, images)
    (landscape,) = search(held_out, grid=BetaGrid(low=0.2, high=9.0, steps=31, refinements=1)).landscapes
    for beta, alpha, correct in zip(landscape.betas, landscape.alphas, landscape.correct, strict=True):
        logits = held_out.combine(beta, Ensemble()).logits(alpha)
        assert int((logits.argmax(1) == held_out.labels).sum()) == correct


def test_folds_in_a_temporary_file_train_as_in_memory(monkeypatch):
    cache, views, images = problem(4)
    training = KeyTraining(epochs=4, lr=0.05, batch=5, seed=11)
    expected, epoch = cross_fit(cache, views, images, training, 3, "loss")
    monkeypatch.setattr("cafo.spill._BYTES_IN_MEMORY", 0)
    written, write = [], Spill._write
    monkeypatch.setattr(Spill, "_write", lambda spill, flat: written.append(flat.numel()) or write(spill, flat))
    got, same = cross_fit(cache, views, images, training, 3, "loss")
    assert (same, len(got.key_sets)) == (epoch, 3)
    assert epoch.epoch > 0
    for one, other in zip(got.key_sets, expected.key_sets, strict=True):
        for name, keys in one.keys.items():
            assert torch.equal(keys, other.keys[name])
    numbers = sum(k.numel() for k in cache.keys.values())
    kept = sum(int(one.seen.sum()) for one in got.key_sets) / len(cache.labels)
    assert sum(written) == pytest.approx(numbers * (3 + 3 * kept))  # best keys of 3 folds; keys and two moments
