"""Predictions against NumPy's sorting and naive prediction sets; coverage; the cache without what it does not use."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cafo.cache import Cache, load_cache, save_cache
from cafo.calibration import Calibration
from cafo.ensemble import NOTHING, Ensemble
from cafo.errors import CafoError
from cafo.prediction import predict, rank, used_encoders, used_part
from cafo.prediction_sets import in_set, score_threshold

B, N, M = 11, 5, 13
WIDTHS = {"clip": 7, "dino": 17, "other": 3}


def make_cache(**changes) -> Cache:
    rng = torch.Generator().manual_seed(3)
    cache = Cache(
        keys={name: torch.nn.functional.normalize(torch.randn(M, c, generator=rng)) for name, c in WIDTHS.items()},
        labels=torch.arange(M) % N,
        classifier=torch.randn(WIDTHS["clip"], N, generator=rng) / 10,
        class_names=tuple("abcde"),
        alpha=2.5,
        beta=3.5,
        calibration=Calibration(temperature=1.7, scores=torch.rand(23, generator=rng).sort().values),
    )
    return replace(cache, **changes)


def make_features() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    return {name: torch.nn.functional.normalize(torch.randn(B, c, generator=rng)) for name, c in WIDTHS.items()}


def test_predictions_are_the_sorted_calibrated_probabilities() -> None:
    cache = make_cache()
    logits = cache.logits(make_features())
    made = predict(cache, logits, top=3, coverage=0.8)
    scores = sorted(cache.calibration.scores.tolist())
    threshold = scores[math.ceil(24 * 0.8) - 1]
    for row, prediction in zip(logits.double().numpy(), made, strict=True):
        p = np.exp(row / 1.7) / np.exp(row / 1.7).sum()
        order = np.argsort(-p)
        names = [cache.class_names[label] for label in order]
        assert [name for name, _ in prediction.top] == names[:3]
        assert [value for _, value in prediction.top] == pytest.approx(p[order[:3]], abs=1e-6)
        assert prediction[:2] == prediction.top[0]
        assert prediction.margin == pytest.approx(p[order[0]] - p[order[1]], abs=1e-6)
        naive = [name for name, value in zip(names, p[order], strict=True) if 1 - value <= threshold]
        assert list(prediction.prediction_set) == (naive or names[:1])
    assert len({prediction.prediction_set for prediction in made}) > 3
    plain = predict(replace(cache, calibration=None), logits, top=9, coverage=None)
    torch.testing.assert_close(torch.tensor([p.probability for p in plain]), logits.softmax(-1).max(-1).values)
    assert all(len(p.top) == N and p.prediction_set is None for p in plain)


def test_sets_cover_as_often_as_they_say() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60_000, N, generator=rng)
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=rng)[:, 0]
    p = (logits / 3).softmax(dim=-1)  # badly calibrated probabilities are covered too
    own = p.gather(1, labels[:, None])[:, 0]
    for coverage in (0.8, 0.95):
        threshold = score_threshold((1 - own[:30_000]).sort().values, coverage)
        covered = in_set(p[30_000:], threshold).gather(1, labels[30_000:, None])
        assert float(covered.float().mean()) == pytest.approx(coverage, abs=0.01)
    few = [  # the expected coverage with few images, over many draws of them
        float(in_set(p[at + 19 : at + 60], score_threshold((1 - own[at : at + 19]).sort().values, 0.9))
              .gather(1, labels[at + 19 : at + 60, None]).float().mean())
        for at in range(0, 60_000 - 60, 60)
    ]  # fmt: skip
    assert np.mean(few) == pytest.approx(0.9, abs=0.015)  # at least 0.9; a plain quantile would give 0.85


def test_what_a_classifier_cannot_give_is_an_error() -> None:
    scores = torch.linspace(0, 1, 9)
    assert score_threshold(scores, 0.9) == 1.0  # 10 * 0.9 is 9, the last
    with pytest.raises(CafoError, match=r"of 0\.95 need 19 held-out images, and the classifier has 9"):
        score_threshold(scores, 0.95)
    with pytest.raises(CafoError, match="between 0 and 1"):
        score_threshold(scores, 90)
    with pytest.raises(CafoError, match="chosen without any"):
        rank(torch.zeros(2, N), None, 1, 0.9)
    with pytest.raises(CafoError, match="1 or more, got 0"):
        rank(torch.zeros(2, N), None, 0)


def test_a_saved_cache_keeps_its_calibration(tmp_path) -> None:
    for cache in (make_cache(), make_cache(calibration=None)):
        save_cache(cache, tmp_path / "cache.safetensors")
        read = load_cache(tmp_path / "cache.safetensors").calibration
        if cache.calibration is None:
            assert read is None
        else:
            assert read.temperature == cache.calibration.temperature
            assert torch.equal(read.scores, cache.calibration.scores)


def test_the_part_that_is_used_gives_equal_logits() -> None:
    features, seen = make_features(), set()
    subsets = [None, ("dino",), ("dino", "other"), ("other", "clip")]
    for sources, baseline in itertools.product(subsets, ["zero_shot", NOTHING, "other"]):
        if baseline == "other" and sources == ("dino",):
            sources = ("dino", "other")
        cache = make_cache(ensemble=Ensemble(baseline=baseline, sources=sources, scales={"dino": 0.5}))
        part = used_part(cache)
        names = used_encoders(part)
        seen.add(names)
        assert torch.equal(part.logits({name: features[name] for name in names}), cache.logits(features))
    assert ("dino",) in seen
    assert ("dino", "clip") in seen
