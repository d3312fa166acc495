"""Tip-Adapter and Tip-Adapter-F against their equations in loops, and a training step by step."""

import math

import pytest
import torch

from cafo.errors import CafoError
from cafo.methods.tip_adapter import TipAdapter, TipAdapterF
from cafo.methods.training import Training
from tests.cafo.methods import problem


def votes_loop(keys, labels, features, beta):
    """exp(-β (1 - f Gᵀ)) Y."""
    rows = []
    for f in features:
        row = [0.0] * problem.N
        for key, label in zip(keys, labels.tolist(), strict=True):
            row[label] += math.exp(-beta * (1 - problem.dot(f, key)))
        rows.append(row)
    return rows


def test_the_cache_votes():
    train, others, _ = problem.images()
    terms = TipAdapter().fit(train, seed=0).terms(others)({"beta": 3.7, "epoch": 0})
    problem.close(terms.base, problem.zero_shot(train, others))
    expected = votes_loop(problem.keys(train), train.labels, problem.units(others.embeddings), 3.7)
    problem.close(terms.term, expected)


def test_the_grid_is_the_authors():
    (stage,) = TipAdapter().stages
    assert len(stage.settings) == 200
    assert len(stage.alphas) == 20
    assert stage.settings[199]["beta"] == pytest.approx(0.1 + 199 * 11.9 / 200)
    assert stage.alphas[3] == pytest.approx(0.1 + 3 * 4.9 / 20)


def test_the_keys_are_trained_by_adamw_on_the_views():
    train, others, _ = problem.images(seed=1, noise=3.0)  # wrong often enough to learn
    training = Training(epochs=3, lr=3e-2, eps=1e-4, weight_decay=0.01, batch=4)
    fitted = TipAdapterF(alpha=2.3, beta=1.9, training=training).fit(train, seed=5)
    images, width, steps = len(train.labels), problem.C, 3 * -(-len(train.labels) // 4)
    keys = torch.tensor(problem.keys(train), dtype=torch.float64)
    views = torch.nn.functional.normalize(train.views.embeddings.double(), dim=-1)
    text = train.classifier.double().T
    first, second = torch.zeros(images, width).double(), torch.zeros(images, width).double()
    rng, step = torch.Generator().manual_seed(5), 0
    for epoch in range(3):
        for rows in torch.randperm(images, generator=rng).split(4):
            lr = 3e-2 * (1 + math.cos(math.pi * step / steps)) / 2
            step += 1
            gradient = torch.zeros(images, width).double()
            for i in rows.tolist():
                f = views[epoch % problem.VIEWS, i]
                phi = torch.exp(-1.9 * (1 - keys @ f))
                logits = 100 * text @ f
                for key, label in enumerate(train.labels.tolist()):
                    logits[label] += 2.3 * phi[key]
                error = logits.softmax(0)
                error[train.labels[i]] -= 1
                for key, label in enumerate(train.labels.tolist()):
                    gradient[key] += error[label] * 2.3 * 1.9 * phi[key] * f / len(rows)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            keys = keys * (1 - lr * 0.01)
            keys -= lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-4)
    torch.testing.assert_close(fitted.keys[3].double(), keys, rtol=2e-3, atol=2e-4)
    assert (fitted.keys[3] - fitted.keys[0]).abs().max() > 0.05
    terms = fitted.terms(others)({"beta": 0.7, "epoch": 3})
    problem.close(terms.term, votes_loop(keys.tolist(), train.labels, problem.units(others.embeddings), 0.7), 1e-2)


def test_a_loss_that_is_not_finite_is_told():
    train, _, _ = problem.images()
    with pytest.raises(CafoError, match="lower the learning rate"):
        TipAdapterF(alpha=math.nan).fit(train, seed=0)
