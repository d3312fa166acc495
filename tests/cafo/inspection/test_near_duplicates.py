"""Near-duplicates are all pairs above the threshold, whatever the size of a block."""

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from cafo.errors import CafoError
from cafo.inspection.near_duplicates import find_near_duplicates


def make_features(images: int = 83) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randint(0, 29, (images,), generator=rng)
    features = {}
    for name, width in (("clip", 11), ("dino", 13)):
        means = torch.randn(29, width, generator=rng)
        scale = 1 + torch.rand(images, 1, generator=rng)
        features[name] = (means[centres] + 0.3 * torch.randn(images, width, generator=rng)) * scale
    return features


@pytest.mark.parametrize("block", [1, 7, 83, 200])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_pairs_are_those_of_scikit_learn(block: int, threshold: float) -> None:
    features = make_features()
    cosines = np.minimum(*(cosine_similarity(f.double().numpy()) for f in features.values()))
    expected = {(i, j) for i, j in combinations(range(83), 2) if cosines[i, j] >= threshold}
    assert expected
    found = find_near_duplicates(features, threshold, block=block)
    assert {(pair.first, pair.second) for pair in found.pairs} == expected
    assert found.total == len(expected)
    assert [p.cosine for p in found.pairs] == sorted((p.cosine for p in found.pairs), reverse=True)
    for pair in found.pairs:
        assert pair.cosine == pytest.approx(cosines[pair.first, pair.second], abs=1e-5)


def test_only_the_nearest_pairs_are_kept_and_all_are_counted() -> None:
    features = make_features()
    whole = find_near_duplicates(features, 0.5, block=200)
    cut = find_near_duplicates(features, 0.5, most=5, block=7)
    assert cut.total == whole.total > 10
    assert [p[:2] for p in cut.pairs] == [p[:2] for p in whole.pairs[:5]]


def test_copies_come_in_the_order_of_the_images_and_zeros_are_like_nothing() -> None:
    rows = torch.eye(7)[[0, 1, 0, 2, 0, 1]]
    rows = torch.cat([rows, torch.zeros(2, 7)])
    found = find_near_duplicates({"clip": rows}, 1.0, block=2)
    assert [tuple(pair) for pair in found.pairs] == [(0, 2, 1.0), (0, 4, 1.0), (1, 5, 1.0), (2, 4, 1.0)]


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(CafoError, match="at least one encoder"):
        find_near_duplicates({}, 0.9)
    with pytest.raises(CafoError, match=r"at most 1, got 90"):
        find_near_duplicates(make_features(), 90)
    assert find_near_duplicates({"clip": torch.empty(0, 5)}, 0.9) == ((), 0)
