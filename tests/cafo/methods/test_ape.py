"""APE and APE-T against their equations in loops."""

import math

import torch
from torch.nn import functional as F

from cafo.methods.ape import Ape, best_channels
from cafo.methods.ape_t import ApeT
from cafo.methods.training import Training
from tests.cafo.methods import problem


def scores_loop(stacks, text, w):
    """J_k, with S as the mean product over all pairs of rows of different classes."""
    scores = []
    for k in range(problem.C):
        products = [
            a[k] * b[k]
            for i, mine in enumerate(stacks)
            for j, theirs in enumerate(stacks)
            if i != j
            for a in mine
            for b in theirs
        ]
        column = [t[k] for t in text]
        mid = sum(column) / len(column)
        variance = sum((x - mid) ** 2 for x in column) / (len(column) - 1)
        scores.append(-w * sum(products) / len(products) + (1 - w) * variance)
    return scores


def best_loop(scores, count):
    return sorted(range(len(scores)), key=lambda k: -scores[k])[:count]


def test_channels_and_weighted_votes():
    train, others, _ = problem.images(seed=2)
    fitted = Ape(channels=0.62, similarity_weight=0.3).fit(train, seed=0)
    keys, text, labels = problem.keys(train), problem.text(train), train.labels.tolist()
    stacks = [[text[c], *(k for k, label in zip(keys, labels, strict=True) if label == c)] for c in range(problem.N)]
    kept = best_loop(scores_loop(stacks, text, 0.3), 10)
    assert fitted.channels.tolist() == kept

    def cut(row):
        return problem.unit([row[k] for k in kept])

    expected = []
    for f in problem.units(others.embeddings):
        row = [0.0] * problem.N
        for key, label in zip(keys, labels, strict=True):
            powers = [math.exp(problem.dot(cut(key), cut(t))) for t in text]
            disagreement = math.log2((1 + 1e-6) / (powers[label] / sum(powers) + 1e-6))
            row[label] += math.exp(0.4 * disagreement) * math.exp(-2.9 * (1 - problem.dot(cut(f), cut(key))))
        expected.append(row)
    terms = fitted.terms(others)({"beta": 2.9, "gamma": 0.4})
    problem.close(terms.base, problem.zero_shot(train, others))
    problem.close(terms.term, expected)


def test_residuals_and_weights_are_trained():
    train, others, _ = problem.images(seed=3, noise=3.0)
    method = ApeT(
        channels=0.62,
        alpha=1.7,
        beta=1.3,
        training=Training(epochs=2, lr=2e-2, eps=1e-3, weight_decay=0.1, batch=4),
    )
    fitted = method.fit(train, seed=7)
    text, keys = train.classifier.double().T, torch.tensor(problem.keys(train), dtype=torch.float64)
    kept = best_loop(scores_loop([[t] for t in text.tolist()], text.tolist(), 0.2), 10)
    assert fitted.channels.tolist() == kept
    values = F.one_hot(train.labels, problem.N).double()
    spread = F.one_hot(torch.tensor(kept), problem.C).double()  # (Q, C)
    residual = torch.zeros(problem.N, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.ones(len(keys), dtype=torch.float64, requires_grad=True)

    def logits(f, alpha, beta):
        own_text, own_keys = text + residual @ spread, keys + values @ residual @ spread
        return 100 * f @ own_text.T + alpha * torch.exp(-beta * (1 - f @ own_keys.T)) @ (weights[:, None] * values)

    optimizer = torch.optim.AdamW([residual, weights], lr=2e-2, eps=1e-3, weight_decay=0.1)
    views, rng = F.normalize(train.views.embeddings.double(), dim=-1), torch.Generator().manual_seed(7)
    steps, step = 2 * -(-len(keys) // 4), 0
    for epoch in range(2):
        for rows in torch.randperm(len(keys), generator=rng).split(4):
            optimizer.param_groups[0]["lr"] = 2e-2 * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            F.cross_entropy(logits(views[epoch % problem.VIEWS, rows], 1.7, 1.3), train.labels[rows]).backward()
            optimizer.step()
            step += 1
    assert residual.abs().max() > 0.01
    got = fitted.terms(others)({"epoch": 2, "beta": 2.1}).logits(0.6)
    f = F.normalize(others.embeddings.double(), dim=-1)
    problem.close(got, logits(f, 0.6, 2.1).tolist(), rtol=1e-3)
    untrained = fitted.terms(others)({"epoch": 0, "beta": 2.1})
    problem.close(untrained.base, problem.zero_shot(train, others))


def test_classes_of_different_sizes_count_alike():
    means = torch.rand(problem.N, problem.C, generator=torch.Generator().manual_seed(0)).double()
    expected = scores_loop([[row] for row in means.tolist()], means.tolist(), 0.9)
    assert best_channels(means, means, 0.9, 1.0).tolist() == best_loop(expected, problem.C)
