"""Confusions are those of scikit-learn's matrix, and their reasons add up to the difference of the logits."""

import pytest
import torch
from sklearn.metrics import confusion_matrix

from cafo.ensemble import Ensemble
from cafo.held_out import on_validation
from cafo.inspection.confusions import find_confusions
from tests.cafo.inspection.test_contributions import CLASSES, IMAGES, make_cache


@pytest.mark.parametrize("ensemble", [Ensemble(), Ensemble(rule="maximum")], ids=["adaptive", "maximum"])
def test_confusions_and_their_reasons(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cafo.inspection.confusions._IMAGES_AT_ONCE", 2)
    cache, features = make_cache()
    rng = torch.Generator().manual_seed(1)
    features = {
        name: f.repeat(9, 1) + 0.1 * torch.randn(9 * IMAGES, f.shape[1], generator=rng) for name, f in features.items()
    }
    labels = torch.arange(9 * IMAGES) % CLASSES
    held_out = on_validation(cache, features, labels)
    logits = held_out.combine(cache.beta, ensemble).logits(cache.alpha)
    predicted, skipped = logits.argmax(dim=1), 3
    logits[skipped] = torch.nan
    kept = [row for row in range(len(labels)) if row != skipped]
    found = find_confusions(logits, labels, held_out.images, (cache.alpha, cache.beta, ensemble), votes=3)

    matrix = confusion_matrix(labels[kept], predicted[kept], labels=range(CLASSES))
    expected = {(t, p): int(matrix[t, p]) for t in range(CLASSES) for p in range(CLASSES) if t != p and matrix[t, p]}
    assert {(c.label, c.predicted): len(c.images) for c in found} == expected
    assert [len(c.images) for c in found] == sorted(expected.values(), reverse=True)
    assert max(expected.values()) > 2, "more than a block"
    for confusion in found:
        rows = list(confusion.images)
        assert confusion.of == matrix[confusion.label].sum()
        difference = logits[rows, confusion.predicted] - logits[rows, confusion.label]
        assert confusion.margin == pytest.approx(float(difference.mean()), abs=1e-4)
        assert confusion.text + sum(confusion.sources.values()) == pytest.approx(confusion.margin, abs=1e-4)
        assert len(confusion.votes) == 3
    assert len(find_confusions(logits, labels, held_out.images, (1.7, 3.1, ensemble), most=2)) == 2
