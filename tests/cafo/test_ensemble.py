import pytest
import torch
from sklearn.preprocessing import StandardScaler

from cafo.cache import affinity, class_logits, zero_shot_logits
from cafo.ensemble import Ensemble, combine, inverse_spread, standardise, table5
from tests.cafo import reference

B, N = 13, 7


def predictions(seed=0, names=("clip", "dino")):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, generator=g) * 3, {n: torch.rand(B, N, generator=g) for n in names}


def test_standardise_is_scikit_learns_scaler_with_the_unbiased_deviation():
    p = torch.randn(B, N, dtype=torch.float64)
    expected = StandardScaler().fit_transform(p.T.numpy()).T * ((N - 1) / N) ** 0.5
    torch.testing.assert_close(standardise(p), torch.from_numpy(expected))


def test_a_flat_prediction_becomes_zeros_without_nan_gradients():
    p = torch.full((3, N), 0.1, requires_grad=True)
    z = standardise(p)
    z.sum().backward()
    assert torch.equal(z, torch.zeros_like(z))
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("mean", [1e-4, 0.3, 2e3])
def test_what_is_flat_up_to_rounding_is_flat_whatever_its_mean(mean):
    apart = torch.linspace(-1, 1, N, dtype=torch.float64)
    flat, slanted = ((mean * (1 + share * apart)).float()[None] for share in (1e-7, 1e-3))
    assert inverse_spread(flat).tolist() == [[0.0]]
    assert float(inverse_spread(slanted)) == pytest.approx(1 / float(slanted.double().std()), rel=1e-2)
    assert standardise(flat).count_nonzero() == 0
    torch.testing.assert_close(standardise(slanted)[0], (apart / apart.std()).float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("names", [("clip",), ("clip", "dino"), ("clip", "dino", "third")])
def test_the_adaptive_rule_is_equations_8_and_9(names):
    keys, features, classifier, key_labels, _ = reference.problem(widths=(11, 13, 17))
    zero_shot = zero_shot_logits(features["clip"], classifier)
    caches = {n: class_logits(affinity(keys[n], features[n]), key_labels, 7, 4.3) for n in names}
    scales = dict(zip(names, (0.5, 1.0, 0.25), strict=False))
    got = combine(zero_shot, caches, Ensemble(temperature=1.7, scales=scales)).logits(0.9)
    naive = [reference.cache_logits_loop(keys[n], key_labels, features[n], 7, 4.3) for n in names]
    expected = reference.adaptive_loop(zero_shot.double().tolist(), naive, 0.9, 1.7, list(scales.values()))
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_the_other_rules_of_table_5():
    zero_shot, caches = predictions()
    z = {n: standardise(p) for n, p in caches.items()}
    rows = {name: combine(zero_shot, caches, e) for name, e in table5(tuple(caches)).items()}
    assert list(rows) == [
        "clip alone", "dino alone",
        "clip only", "dino only", "average", "maximum", "baseline clip", "baseline dino", "baseline zero-shot",
    ]  # fmt: skip
    torch.testing.assert_close(rows["clip only"].term, z["clip"])
    torch.testing.assert_close(rows["dino alone"].logits(1.0), z["dino"])
    torch.testing.assert_close(rows["dino only"].term, z["dino"])
    torch.testing.assert_close(rows["average"].term, (z["clip"] + z["dino"]) / 2)
    torch.testing.assert_close(rows["maximum"].term, torch.maximum(z["clip"], z["dino"]))
    torch.testing.assert_close(rows["baseline zero-shot"].term, combine(zero_shot, caches, Ensemble()).term)
    # p_DINO as baseline: it changes places with p_ZS
    swapped = combine(z["dino"], {"zs": zero_shot, "clip": caches["clip"]}, Ensemble())
    torch.testing.assert_close(rows["baseline dino"].logits(0.7), swapped.logits(0.7))
    assert rows["baseline dino"].sources == ("zero_shot", "clip")
    assert torch.equal(rows["baseline zero-shot"].term, combine(zero_shot, caches, Ensemble(temperature=1.0)).term)
    larger = (z["clip"] > z["dino"]).float().mean(dim=1)
    torch.testing.assert_close(rows["maximum"].shares, torch.stack([larger, 1 - larger], dim=1))
    for name in ("average", "dino alone"):
        share = 1 / len(rows[name].sources)
        torch.testing.assert_close(rows[name].shares, torch.full((B, len(rows[name].sources)), share))
    for row in rows.values():
        torch.testing.assert_close(row.shares.sum(dim=-1), torch.ones(B))


def test_a_factor_per_image_and_leading_axes_change_nothing():
    zero_shot, caches = predictions()
    factor = torch.rand(B, 1) + 0.1
    scaled = {n: p * factor for n, p in caches.items()}
    for ensemble in table5(tuple(caches)).values():
        one = combine(zero_shot, caches, ensemble).logits(0.3)
        torch.testing.assert_close(combine(zero_shot, scaled, ensemble).logits(0.3), one)
        stacked = {n: torch.stack([p, p.flip(-1), p]) for n, p in caches.items()}
        together = combine(zero_shot, stacked, ensemble)
        torch.testing.assert_close(together.logits(0.3)[2], one)
        shares = combine(zero_shot, {n: p.flip(-1) for n, p in caches.items()}, ensemble).shares
        torch.testing.assert_close(together.shares[1], shares)


def test_predictions_that_are_standardised_already_are_not_again():
    zero_shot, caches = predictions()
    z = {"zero_shot": standardise(zero_shot), **{n: standardise(p) for n, p in caches.items()}}
    anything = {n: torch.full_like(p, torch.nan) for n, p in caches.items()}
    for ensemble in table5(tuple(caches)).values():
        expected, got = combine(zero_shot, caches, ensemble), combine(zero_shot, anything, ensemble, z)
        for part, other in zip(expected[:3], got[:3], strict=True):
            torch.testing.assert_close(other, part)


def test_two_classes_are_enough_and_a_scale_multiplies_its_source():
    zero_shot, caches = predictions()
    two = {name: p[:, :2] for name, p in caches.items()}
    assert combine(zero_shot[:, :2], two, Ensemble()).term.shape == (B, 2)
    z = {name: standardise(p) for name, p in caches.items()}
    scaled = combine(zero_shot, caches, Ensemble(rule="average", scales={"clip": 2.0}))
    torch.testing.assert_close(scaled.term, (2 * z["clip"] + z["dino"]) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "vote"}, "vote"),
        ({"temperature": 0.0}, "temperature"),
        ({"scales": {"clip": -1.0}}, "clip"),
        ({"scales": {"clip": 0.0}}, "clip"),
        ({"rule": "average", "baseline": "clip"}, "baseline"),
    ],
)
def test_errors_of_an_ensemble_name_the_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(**arguments)


def test_unknown_sources_are_named():
    zero_shot, caches = predictions()
    for ensemble in (Ensemble(sources=("mae",)), Ensemble(baseline="mae"), Ensemble(scales={"mae": 2.0})):
        with pytest.raises(ValueError, match="mae"):
            combine(zero_shot, caches, ensemble)
    with pytest.raises(ValueError, match=r"no cache named mae; there are clip, dino$"):
        combine(zero_shot, caches, Ensemble(sources=("mae",)))
    with pytest.raises(ValueError, match=r"there are none$"):
        combine(zero_shot, {}, Ensemble(sources=("mae",)))
    with pytest.raises(ValueError, match="two classes"):
        combine(zero_shot[:, :1], caches, Ensemble())


def test_text_in_place_of_a_list_of_sources_is_refused():
    for use in (lambda: Ensemble(sources="clip"), lambda: table5("clip")):
        with pytest.raises(ValueError, match="sources should be a list, got the text 'clip'"):
            use()
