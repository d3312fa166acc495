"""GDA, TIMO and the nearest class mean against their equations in loops."""

import math

import pytest
import torch

from cafo.errors import CafoError
from cafo.methods import METHODS
from cafo.methods.choice import fit
from cafo.methods.gda import Gda
from cafo.methods.nearest_mean import NearestMean
from cafo.methods.timo import Timo
from tests.cafo.methods import problem


def discriminant_loop(samples, labels, features):
    """f·w + b, with the precision as the authors write it: C · pinv((n-1) S + tr(S) I), S with the divisor n-1."""
    count, width = len(samples), problem.C
    means = [problem.mean([s for s, y in zip(samples, labels, strict=True) if y == c]) for c in range(problem.N)]
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for sample, label in zip(samples, labels, strict=True):
        off = torch.tensor(sample, dtype=torch.float64) - torch.tensor(means[label], dtype=torch.float64)
        covariance += off[:, None] * off[None] / (count - 1)
    shrunk = (count - 1) * covariance + covariance.trace() * torch.eye(width, dtype=torch.float64)
    precision = width * torch.linalg.pinv(shrunk)
    rows = []
    for f in features:
        row = []
        for mean in means:
            weight = (precision @ torch.tensor(mean, dtype=torch.float64)).tolist()
            row.append(problem.dot(f, weight) + math.log(1 / problem.N) - problem.dot(mean, weight) / 2)
        rows.append(row)
    return rows


def all_views(train):
    samples = [row for view in train.views.embeddings for row in problem.units(view)]
    return samples, train.labels.tolist() * problem.VIEWS


def test_gda():
    train, others, _ = problem.images(seed=4)
    terms = Gda().fit(train, seed=0).terms(others)({})
    problem.close(terms.base, problem.zero_shot(train, others))
    problem.close(terms.term, discriminant_loop(*all_views(train), problem.units(others.embeddings)), 1e-3, 1e-3)


def test_gda_needs_more_than_one_sample_of_a_class():
    train, _, _ = problem.images(shots=1, views=1)
    with pytest.raises(CafoError, match="give more views"):
        fit(Gda(), train, seed=0)
    assert Gda().lacks(problem.images(shots=1)[0].given) is None


@pytest.mark.parametrize(("share", "sentences"), [(1.0, problem.P), (0.0, 1), (2 * 7 / 9, 11), (2.0, 2 * problem.P)])
def test_timo(share, sentences):
    train, others, _ = problem.images(seed=5)
    features, keys = problem.units(others.embeddings), problem.keys(train)
    prompts, labels = train.prompts.double().tolist(), train.labels.tolist()
    samples, sample_labels = all_views(train)
    guided = []
    for c in range(problem.N):
        prototype = problem.unit(problem.mean([k for k, label in zip(keys, labels, strict=True) if label == c]))
        fits = [problem.dot(prototype, e) for e in prompts[c]]
        powers = [math.exp(20 * m) for m in problem.unit(fits)]
        weighted = [[p / sum(powers) * x for x in e] for p, e in zip(powers, prompts[c], strict=True)]
        guided.append(problem.unit([sum(column) for column in zip(*weighted, strict=True)]))
        order = sorted(range(problem.P), key=lambda p: -fits[p])
        for p in (order * 2)[:sentences]:
            samples.append([fits[p] * x for x in prompts[c][p]])
            sample_labels.append(c)
    terms = Timo(searched=True).fit(train, 0).terms(others)({"gamma": 20.0, "sentences": share, "images": 1.0})
    problem.close(terms.term, [[problem.dot(f, t) for t in guided] for f in features])
    problem.close(terms.base, discriminant_loop(samples, sample_labels, features), 1e-3, 1e-3)


def test_timo_searches_as_many_sentences_as_the_authors():
    train, _, _ = problem.images(seed=5)
    fitted = Timo(searched=True).fit(train, 0)
    counts = []
    fitted.discriminant = lambda count: (counts.append(count), (torch.zeros(5, 17), torch.zeros(5)))[1]
    for setting in Timo(searched=True).stages[1].settings:
        fitted.terms(train.plain)({"gamma": 50.0, **setting})
    assert counts == [int(1 + i * 13 / 9 + 1e-9) for i in range(10)]
    assert counts[0] == 1
    assert counts[-1] == 14


def test_the_text_alone_has_no_share_of_the_images():
    train, others, _ = problem.images(seed=5)
    terms = Timo().fit(train, 0).terms(others)({"gamma": 5.0, "sentences": 1.0, "images": 0.0})
    assert not terms.base.any()
    assert terms.term.any()


def test_nearest_class_mean():
    train, others, _ = problem.images(seed=6)
    samples, labels = all_views(train)
    means = [problem.mean([s for s, y in zip(samples, labels, strict=True) if y == c]) for c in range(problem.N)]
    expected = [
        [-sum((x - m) ** 2 for x, m in zip(f, mean, strict=True)) / 2 for mean in means]
        for f in problem.units(others.embeddings)
    ]
    terms = NearestMean().fit(train, 0).terms(others)({})
    problem.close(terms.logits(0.0), expected)


def test_what_is_missing_is_told_before_anything_is_encoded():
    train, _, _ = problem.images()
    bare = train.given._replace(prompts=False, projection=False)
    lacking = {name for name, method in METHODS.items() if method.lacks(bare)}
    assert lacking == {"TIMO", "TIMO-S", "ProLIP"}
    assert not [name for name, method in METHODS.items() if method.lacks(train.given)]
