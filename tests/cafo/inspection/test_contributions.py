"""Contributions add up to CaFo's own logits, under every rule, and each is what leaving nothing else can explain."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import Cache
from cafo.ensemble import Ensemble, table5
from cafo.errors import CafoError
from cafo.inspection.contributions import contributions_of_cache, decompose, explain, sentence_contributions
from cafo.prompt import zero_shot_classifier

KEYS, IMAGES, CLASSES = 23, 7, 5
WIDTHS = {"clip": 11, "dino": 13}
ENSEMBLES = {
    **table5(("clip", "dino")),
    "scaled": Ensemble(scales={"dino": 0.3, "clip": 2.0}, temperature=7.0),
    "no text": Ensemble(baseline="nothing"),
    "scaled baseline": Ensemble(baseline="dino", scales={"clip": 0.4}),
}


def make_cache() -> tuple[Cache, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(KEYS) % (CLASSES - 1)  # the last class has no key
    cache = Cache(
        keys={name: F.normalize(torch.randn(KEYS, width, generator=rng), dim=1) for name, width in WIDTHS.items()},
        labels=labels,
        classifier=F.normalize(torch.randn(WIDTHS["clip"], CLASSES, generator=rng), dim=0),
        class_names=tuple("abcde"),
        alpha=1.7,
        beta=3.1,
    )
    features = {n: F.normalize(torch.randn(IMAGES, width, generator=rng), dim=1) for n, width in WIDTHS.items()}
    return cache, features


@pytest.mark.parametrize("name", ENSEMBLES)
def test_contributions_add_up_to_the_logits(name: str) -> None:
    cache, features = make_cache()
    cache = replace(cache, ensemble=ENSEMBLES[name])
    found = contributions_of_cache(cache, features)
    torch.testing.assert_close(found.logits(), cache.logits(features), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["baseline zero-shot", "maximum", "baseline dino", "scaled"])
def test_each_contribution_is_that_of_the_equations(name: str) -> None:
    """A naive loop over images, sources, keys and classes gives every single one."""
    cache, features = make_cache()
    cache = replace(cache, ensemble=ENSEMBLES[name])
    found, ensemble = contributions_of_cache(cache, features), cache.ensemble
    combination = cache.combine(features)
    for image in range(IMAGES):
        z, single = {}, {}
        for source, keys in cache.keys.items():
            near = max(float(k @ features[source][image]) for k in keys)
            phi = [math.exp(cache.beta * (float(k @ features[source][image]) - near)) for k in keys]
            p = [sum(v for v, label in zip(phi, cache.labels, strict=True) if label == n) for n in range(CLASSES)]
            mean = sum(p) / CLASSES
            std = math.sqrt(sum((v - mean) ** 2 for v in p) / (CLASSES - 1))
            z[source] = [ensemble.scales.get(source, 1.0) * (v - mean) / std for v in p]
            single[source] = [v / std for v in phi]
        for source, votes in single.items():
            for key, vote in enumerate(votes):
                for n in range(CLASSES):
                    scale = cache.alpha * ensemble.scales.get(source, 1.0)
                    if ensemble.baseline == source:
                        scale = 1.0
                    elif ensemble.rule == "maximum":
                        scale *= float(z[source][n] == max(values[n] for values in z.values()))
                    else:
                        scale *= float(combination.shares[image, combination.sources.index(source)])
                    part = (int(cache.labels[key]) == n) - 1 / CLASSES
                    own = float(found.gains[source][image, n] * found.votes[source][key, image])
                    assert own * part == pytest.approx(scale * vote * part, abs=1e-4)


def test_a_key_that_is_left_out_adds_nothing() -> None:
    cache, features = make_cache()
    affinities = {name: a.clone() for name, a in cache.affinities(features).items()}
    for a in affinities.values():
        a[4, 2] = -math.inf
    found = decompose(cache.zero_shot(features), affinities, cache.labels, cache.alpha, cache.beta, cache.ensemble)
    assert all(votes[4, 2] == 0 and votes[4, 3] > 0 for votes in found.votes.values())
    rest = [k for k in range(KEYS) if k != 4]
    without = replace(cache, keys={n: k[rest] for n, k in cache.keys.items()}, labels=cache.labels[rest])
    torch.testing.assert_close(found.logits()[2], without.logits(features)[2], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["baseline zero-shot", "maximum", "baseline dino"])
def test_an_explanation_adds_up_to_the_margin(name: str) -> None:
    cache, features = make_cache()
    cache = replace(cache, ensemble=ENSEMBLES[name])
    logits = cache.logits(features)
    explained = list(explain(cache, features, votes=4))
    assert len(explained) == IMAGES
    for row, why in zip(logits, explained, strict=True):
        first, second = row.topk(2).indices.tolist()
        assert (why.label, why.rival) == (first, second)
        assert why.margin == pytest.approx(float(row[first] - row[second]), abs=1e-4)
        assert why.text + sum(why.sources.values()) == pytest.approx(why.margin, abs=1e-4)
        assert why.text + sum(vote.pull for vote in why.votes) + why.others == pytest.approx(why.margin, abs=1e-4)
        assert [abs(v.pull) for v in why.votes] == sorted((abs(v.pull) for v in why.votes), reverse=True)
        for vote in why.votes:
            assert sum(vote.by_source.values()) == pytest.approx(vote.pull, abs=1e-5)
            assert vote.label == int(cache.labels[vote.key])
            if name == "baseline zero-shot":  # only keys of the two classes matter, and each for its own
                assert vote.label == (first if vote.pull > 0 else second)


def test_images_in_blocks_are_explained_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, features = make_cache()
    whole = list(explain(cache, features))
    monkeypatch.setattr("cafo.inspection.contributions._FLOATS_AT_ONCE", 3 * KEYS)
    parts = list(explain(cache, features))
    assert [(e.label, e.rival, [v.key for v in e.votes]) for e in parts] == [
        (e.label, e.rival, [v.key for v in e.votes]) for e in whole
    ]


def test_a_cache_without_keys_is_decided_by_text_alone() -> None:
    cache, features = make_cache()
    empty = replace(cache, keys={n: k[:0] for n, k in cache.keys.items()}, labels=cache.labels[:0])
    for why in explain(empty, features):
        assert why.votes == ()
        assert why.text == pytest.approx(why.margin, abs=1e-5)


def test_sentences_add_up_to_the_zero_shot_logits() -> None:
    class Encoder:
        def encode_text(self, sentences: Sequence[str]) -> Tensor:
            rows = [torch.randn(11, generator=torch.Generator().manual_seed(len(text))) for text in sentences]
            return F.normalize(torch.stack(rows), dim=1)

        def is_truncated(self, text: str) -> bool:
            return False

    prompts = {"a": ["x", "xx", "xxx"], "b": ["xxxx"], "c": ["xxxxx", "xxxxxx"]}
    weights = zero_shot_classifier(Encoder(), prompts, list(prompts)).weights
    images = F.normalize(torch.randn(7, 11, generator=torch.Generator().manual_seed(99)), dim=1)
    added = sentence_contributions(images, [Encoder().encode_text(texts) for texts in prompts.values()])
    assert [tuple(part.shape) for part in added] == [(7, 3), (7, 1), (7, 2)]
    summed = torch.stack([part.sum(dim=1) for part in added], dim=1)
    torch.testing.assert_close(summed, 100 * images @ weights, rtol=1e-5, atol=1e-4)
    with pytest.raises(CafoError, match="no sentence for the classes with numbers 1"):
        sentence_contributions(images, [torch.ones(2, 11), torch.ones(0, 11)])
