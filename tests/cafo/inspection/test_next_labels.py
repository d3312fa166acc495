"""The next images to label are those of a naive greedy loop: uncertain, and unlike what is known."""

import math

import pytest
import torch
from torch.nn import functional as F

from cafo.errors import CafoError
from cafo.inspection.next_labels import Uncertainty, choose_next_labels

IMAGES, CLASSES = 31, 5


def make_pool() -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    features = {name: torch.randn(IMAGES, width, generator=rng) for name, width in (("clip", 7), ("dino", 11))}
    labelled = {name: torch.randn(3, f.shape[1], generator=rng) for name, f in features.items()}
    return torch.randn(IMAGES, CLASSES, generator=rng).softmax(dim=1), features, labelled


@pytest.mark.parametrize("by", ["margin", "entropy"])
@pytest.mark.parametrize("known", [True, False])
def test_the_order_is_that_of_a_naive_loop(by: Uncertainty, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cafo.inspection.next_labels._ROWS_AT_ONCE", 7)
    probabilities, features, labelled = make_pool()
    found = choose_next_labels(probabilities, features, 9, labelled=labelled if known else None, by=by)
    cosines = {n: lambda a, b: float(F.cosine_similarity(a, b, dim=0)) for n in features}
    seen = [{name: f[i] for name, f in labelled.items()} for i in range(3)] if known else []
    expected: list[int] = []
    for _ in range(9):
        worth = {}
        for i in range(IMAGES):
            row = sorted(probabilities[i].tolist(), reverse=True)
            doubt = 1 - (row[0] - row[1]) if by == "margin" else -sum(p * math.log(p) for p in row)
            like = [sum(cosines[n](features[n][i], one[n]) for n in features) / 2 for one in seen]
            if i not in expected:
                worth[i] = doubt * (1 - max(like, default=0.0))
        expected.append(max(worth, key=lambda i: worth[i]))
        seen.append({name: f[expected[-1]] for name, f in features.items()})
    assert [one.image for one in found] == expected
    for one in found:
        assert [one.label, one.rival] == probabilities[one.image].topk(2).indices.tolist()


def test_copies_of_a_hard_image_are_taken_once() -> None:
    probabilities, features, _ = make_pool()
    probabilities[:10] = 1 / CLASSES  # ten copies of the hardest image
    for f in features.values():
        f[:10] = f[0].clone()
    found = choose_next_labels(probabilities, features, IMAGES)
    assert sorted(one.image for one in found) == list(range(IMAGES))
    assert [one.image for one in found[:22]].count(0) == 1
    assert all(one.image in range(1, 10) for one in found[-9:]), "copies come last"


def test_what_cannot_be_chosen_is_told() -> None:
    probabilities, features, labelled = make_pool()
    with pytest.raises(CafoError, match="margin or entropy, not by 'loss'"):
        choose_next_labels(probabilities, features, 3, by="loss")  # type: ignore[arg-type]
    with pytest.raises(CafoError, match="there is one"):
        choose_next_labels(probabilities[:, :1], features, 3)
    with pytest.raises(CafoError, match="lack features of dino"):
        choose_next_labels(probabilities, features, 3, labelled={"clip": labelled["clip"]})
    assert choose_next_labels(probabilities[:0], {n: f[:0] for n, f in features.items()}, 3) == []
