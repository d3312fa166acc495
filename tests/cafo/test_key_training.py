import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cafo.ensemble import Ensemble, combine
from cafo.key_training import KeyTraining, train_keys
from tests.cafo.test_cache import N, make


def train(cache, features, labels, **kwargs):
    views = {n: torch.stack([k, F.normalize(k + 0.1, dim=1)]) for n, k in cache.keys.items()}
    return train_keys(cache, views, cache.labels, features, labels, KeyTraining(**kwargs))


def test_training_moves_every_key_and_nothing_else():
    cache, features, labels = make()
    before = {n: k.clone() for n, k in cache.keys.items()}
    classifier = cache.classifier.clone()
    losses = []
    views = {n: k[None] for n, k in cache.keys.items()}
    val = {n: f[:20] for n, f in features.items()}
    # labels that the cache gets wrong, so that training wins against the start
    trained, best = train_keys(
        cache, views, cache.labels.flip(0), val, (6 - labels)[:20], KeyTraining(epochs=40, lr=0.05), losses.append
    )
    assert best.epoch > 0
    assert losses[-1].loss < losses[1].loss
    assert len(losses) == 41
    for name, key in before.items():
        assert torch.equal(cache.keys[name], key)
        assert (trained.keys[name] != key).any(dim=1).all()
        assert not trained.keys[name].requires_grad
    assert torch.equal(trained.classifier, classifier)


def test_one_step_is_adamw_on_the_cross_entropy_of_the_ensemble():
    cache, _, _ = make()
    generator = torch.Generator().manual_seed(5)
    features = {
        n: F.normalize(torch.randn(4001, k.shape[1], generator=generator), dim=1) for n, k in cache.keys.items()
    }
    got = []
    rows = torch.randperm(len(cache.labels), generator=torch.Generator().manual_seed(0))
    keys = {n: k.clone().requires_grad_() for n, k in cache.keys.items()}
    batch = {n: k[rows] for n, k in cache.keys.items()}
    p = {n: torch.exp(-4.0 * (1 - batch[n] @ k.T)) @ F.one_hot(cache.labels, N).float() for n, k in keys.items()}
    logits = combine(100 * batch["clip"] @ cache.classifier, p, Ensemble()).logits(0.8)
    F.cross_entropy(logits, cache.labels[rows]).backward()
    views = {n: k[None] for n, k in cache.keys.items()}
    # every validation answer is made right for the trained keys and wrong for the start, so the step is what comes back
    for name, key in keys.items():
        m, v = 0.1 * key.grad, 0.001 * key.grad**2
        step = (m / 0.1) / ((v / 0.001).sqrt() + 1e-4)
        got.append((name, (key * (1 - 0.05 * 0.01) - 0.05 * step).detach()))
    trained = replace(cache, keys=dict(got))
    answers = trained.logits(features).argmax(1)
    differ = answers != cache.logits(features).argmax(1)
    assert differ.any(), "choose another seed: the step changes no answer, and so would not be chosen"
    val = {n: f[differ] for n, f in features.items()}
    result, best = train_keys(cache, views, cache.labels, val, answers[differ], KeyTraining(epochs=1, lr=0.05))
    assert best.epoch == 1
    for name, expected in got:
        torch.testing.assert_close(result.keys[name], expected, rtol=1e-4, atol=1e-6)


def test_the_cosine_falls_to_zero_at_the_last_of_all_steps(monkeypatch):
    cache, features, labels = make()
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(cache, features, labels, epochs=5, batch=8)  # 21 images: 3 steps an epoch
    expected = [1e-3 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(15)]
    assert rates == pytest.approx(expected)


def test_the_same_seed_gives_the_same_keys_and_another_seed_others():
    cache, features, labels = make()
    wrong = 6 - labels
    one, two, other = (train(cache, features, wrong, epochs=10, lr=0.1, batch=8, seed=s)[0] for s in (0, 0, 1))
    assert all(torch.equal(one.keys[n], two.keys[n]) for n in one.keys)
    assert not all(torch.equal(one.keys[n], other.keys[n]) for n in one.keys)


def test_each_epoch_takes_the_next_view():
    cache, features, labels = make()
    losses = []
    for second in (0.0, 0.3):
        views = {n: torch.stack([k, F.normalize(k + second, dim=1)]) for n, k in cache.keys.items()}
        reports = []
        train_keys(cache, views, cache.labels, features, labels, KeyTraining(epochs=3), reports.append)
        losses.append([epoch.loss for epoch in reports[1:]])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_training_is_stable_at_large_beta():
    cache, features, labels = make()
    reports = []
    views = {n: k[None] for n, k in cache.keys.items()}
    train_keys(replace(cache, beta=200.0), views, cache.labels, features, labels, KeyTraining(epochs=3), reports.append)
    assert all(math.isfinite(e.loss) for e in reports[1:])


def test_a_loss_that_is_not_finite_stops_with_its_step():
    cache, features, labels = make()
    broken = {n: torch.full_like(k, float("nan")) for n, k in cache.keys.items()}
    views = {n: k[None] for n, k in broken.items()}
    with pytest.raises(ValueError, match="step 1"):
        train_keys(cache, views, cache.labels, features, labels, KeyTraining(epochs=1))
