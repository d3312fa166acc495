"""A small problem with distinct prime sizes, and the parts of the papers' equations that several methods share, as
loops in float64."""

import math

import torch
from torch.nn import functional as F

from cafo.methods.base import Features, FewShotImages, Projection

N, C, VIEWS, SHOTS, P, E, B = 5, 17, 2, 3, 7, 19, 11


def images(seed=0, shots=SHOTS, views=VIEWS, noise=0.6):
    """Training images of 5 classes in no order, and features of 11 others with their labels."""
    rng = torch.Generator().manual_seed(seed)

    def near(rows, spread):
        return rows + spread * torch.randn(rows.shape, generator=rng)

    centres = torch.randn(N, E, generator=rng)
    projection = Projection(torch.randn(C, E, generator=rng) / E**0.5, 0.1 * torch.randn(C, generator=rng))
    labels = torch.arange(N).repeat(shots)[torch.randperm(N * shots, generator=rng)]

    def features(unprojected):
        return Features(embeddings=F.linear(unprojected, *projection), unprojected=unprojected)

    own = near(centres[labels], noise)
    prompts = near(F.linear(centres, *projection)[:, None].expand(N, P, C), 1.0)
    prompts = F.normalize(prompts, dim=-1)
    train = FewShotImages(
        views=features(torch.stack([near(own, 0.2) for _ in range(views)])),
        plain=features(own),
        labels=labels,
        classifier=F.normalize(prompts.mean(dim=1), dim=-1).T.contiguous(),
        prompts=prompts,
        projection=projection,
    )
    other_labels = torch.randint(N, (B,), generator=rng)
    return train, features(near(centres[other_labels], noise)), other_labels


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(row):
    length = math.sqrt(dot(row, row))
    return [x / length for x in row]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def units(rows):
    return [unit(row) for row in rows.double().tolist()]


def keys(train):
    """Each image's views, averaged as they are and then scaled to unit length."""
    views = train.views.embeddings.double().tolist()
    return [unit(mean([view[i] for view in views])) for i in range(len(train.labels))]


def text(train):
    return train.classifier.double().T.tolist()


def zero_shot(train, features):
    return [[100 * dot(f, t) for t in text(train)] for f in units(features.embeddings)]


def close(got, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)
