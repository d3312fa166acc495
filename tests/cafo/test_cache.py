import math
import os
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from cafo.cache import (
    Cache,
    KeyTraining,
    affinity,
    class_logits,
    load_cache,
    mean_key,
    save_cache,
    train_keys,
)
from cafo.ensemble import Ensemble, combine, standardise
from cafo.errors import CafoError
from tests.cafo import reference

N = 7


def make(seed=0, **kwargs):
    keys, features, classifier, key_labels, labels = reference.problem(seed, **kwargs)
    cache = Cache(
        keys=keys, labels=key_labels, classifier=classifier, class_names=tuple("abcdefg"), beta=4.0, alpha=0.8
    )
    return cache, features, labels


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("beta", [0.1, 5.5, 50.0])
def test_class_sums_are_the_product_with_one_hot_values(beta, ragged):
    keys, features, _, key_labels, _ = reference.problem(ragged=ragged)
    naive = reference.cache_logits_loop(keys["clip"], key_labels, features["clip"], N, beta)
    got = class_logits(affinity(keys["clip"], features["clip"]), key_labels, N, beta)
    expected = torch.tensor(naive, dtype=torch.float64)
    ratio = got.double() / expected  # one factor per image, the same for every class with keys
    ratio = torch.where(expected > 0, ratio, ratio.nan_to_num(0).amax(1, keepdim=True))
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=2e-4, atol=0)


def test_the_width_comes_from_the_class_list_not_from_the_labels():
    cache, features, _ = make()
    short = replace(
        cache, keys={n: k[cache.labels < 5] for n, k in cache.keys.items()}, labels=cache.labels[cache.labels < 5]
    )
    assert short.logits(features).shape == (53, N)


def test_large_beta_far_from_all_keys_does_not_underflow():
    a = torch.linspace(-1, -0.5, 21)[:, None].expand(21, 5)
    p = class_logits(a, torch.arange(21) % N, N, 400.0)
    assert torch.isfinite(standardise(p)).all()
    assert (p.argmax(1) == 20 % N).all()


def test_a_cache_without_keys_is_zero_shot():
    cache, features, _ = make()
    empty = replace(cache, keys={n: k[:0] for n, k in cache.keys.items()}, labels=cache.labels[:0])
    torch.testing.assert_close(empty.logits(features), cache.zero_shot(features))


def test_logits_follow_the_equations_and_are_float32_for_half_precision_features():
    cache, features, _ = make()
    naive = [reference.cache_logits_loop(cache.keys[n], cache.labels, features[n], N, 4.0) for n in cache.keys]
    expected = reference.adaptive_loop((100 * features["clip"] @ cache.classifier).double().tolist(), naive, 0.8)
    got = cache.logits(features)
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert cache.logits({n: f.bfloat16() for n, f in features.items()}).dtype == torch.float32


def test_mean_key():
    views = torch.randn(3, 5, 11)
    torch.testing.assert_close(mean_key(views), F.normalize((views[0] + views[1] + views[2]) / 3, dim=1))


def train(cache, features, labels, **kwargs):
    views = {n: torch.stack([k, F.normalize(k + 0.1, dim=1)]) for n, k in cache.keys.items()}
    return train_keys(cache, views, cache.labels, features, labels, KeyTraining(**kwargs))


def test_training_moves_every_key_and_nothing_else():
    cache, features, labels = make()
    before = {n: k.clone() for n, k in cache.keys.items()}
    classifier = cache.classifier.clone()
    losses = []
    views = {n: k[None] for n, k in cache.keys.items()}
    val = {n: f[:20] for n, f in features.items()}
    # labels that the cache gets wrong, so that training wins against the start
    trained, best = train_keys(
        cache, views, cache.labels.flip(0), val, (6 - labels)[:20], KeyTraining(epochs=40, lr=0.05), losses.append
    )
    assert best.epoch > 0
    assert losses[-1].loss < losses[1].loss
    assert len(losses) == 41
    for name, key in before.items():
        assert torch.equal(cache.keys[name], key)
        assert (trained.keys[name] != key).any(dim=1).all()
        assert not trained.keys[name].requires_grad
    assert torch.equal(trained.classifier, classifier)


def test_one_step_is_adamw_on_the_cross_entropy_of_the_ensemble():
    cache, _, _ = make()
    generator = torch.Generator().manual_seed(5)
    features = {
        n: F.normalize(torch.randn(4001, k.shape[1], generator=generator), dim=1) for n, k in cache.keys.items()
    }
    got = []
    rows = torch.randperm(len(cache.labels), generator=torch.Generator().manual_seed(0))
    keys = {n: k.clone().requires_grad_() for n, k in cache.keys.items()}
    batch = {n: k[rows] for n, k in cache.keys.items()}
    p = {n: torch.exp(-4.0 * (1 - batch[n] @ k.T)) @ F.one_hot(cache.labels, N).float() for n, k in keys.items()}
    logits = combine(100 * batch["clip"] @ cache.classifier, p, Ensemble()).logits(0.8)
    F.cross_entropy(logits, cache.labels[rows]).backward()
    views = {n: k[None] for n, k in cache.keys.items()}
    # every validation answer is made right for the trained keys and wrong for the start, so the step is what comes back
    for name, key in keys.items():
        m, v = 0.1 * key.grad, 0.001 * key.grad**2
        step = (m / 0.1) / ((v / 0.001).sqrt() + 1e-4)
        got.append((name, (key * (1 - 0.05 * 0.01) - 0.05 * step).detach()))
    trained = replace(cache, keys=dict(got))
    answers = trained.logits(features).argmax(1)
    differ = answers != cache.logits(features).argmax(1)
    assert differ.any(), "choose another seed: the step changes no answer, and so would not be chosen"
    val = {n: f[differ] for n, f in features.items()}
    result, best = train_keys(cache, views, cache.labels, val, answers[differ], KeyTraining(epochs=1, lr=0.05))
    assert best.epoch == 1
    for name, expected in got:
        torch.testing.assert_close(result.keys[name], expected, rtol=1e-4, atol=1e-6)


def test_the_cosine_falls_to_zero_at_the_last_of_all_steps(monkeypatch):
    cache, features, labels = make()
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(cache, features, labels, epochs=5, batch=8)  # 21 images: 3 steps an epoch
    expected = [1e-3 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(15)]
    assert rates == pytest.approx(expected)


def test_the_same_seed_gives_the_same_keys_and_another_seed_others():
    cache, features, labels = make()
    wrong = 6 - labels
    one, two, other = (train(cache, features, wrong, epochs=10, lr=0.1, batch=8, seed=s)[0] for s in (0, 0, 1))
    assert all(torch.equal(one.keys[n], two.keys[n]) for n in one.keys)
    assert not all(torch.equal(one.keys[n], other.keys[n]) for n in one.keys)


def test_each_epoch_takes_the_next_view():
    cache, features, labels = make()
    losses = []
    for second in (0.0, 0.3):
        views = {n: torch.stack([k, F.normalize(k + second, dim=1)]) for n, k in cache.keys.items()}
        reports = []
        train_keys(cache, views, cache.labels, features, labels, KeyTraining(epochs=3), reports.append)
        losses.append([epoch.loss for epoch in reports[1:]])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_training_is_stable_at_large_beta():
    cache, features, labels = make()
    reports = []
    views = {n: k[None] for n, k in cache.keys.items()}
    train_keys(replace(cache, beta=200.0), views, cache.labels, features, labels, KeyTraining(epochs=3), reports.append)
    assert all(math.isfinite(e.loss) for e in reports[1:])


def test_a_loss_that_is_not_finite_stops_with_its_step():
    cache, features, labels = make()
    broken = {n: torch.full_like(k, float("nan")) for n, k in cache.keys.items()}
    views = {n: k[None] for n, k in broken.items()}
    with pytest.raises(ValueError, match="step 1"):
        train_keys(cache, views, cache.labels, features, labels, KeyTraining(epochs=1))


def test_a_saved_cache_is_read_back_equal(tmp_path):
    cache, features, _ = make()
    chosen = replace(
        cache,
        alpha=1 / 3,
        beta=0.1 + 0.2,
        encoders={"clip": "RN50-abc"},
        ensemble=Ensemble(sources=("clip", "dino"), temperature=3.0, scales={"dino": 0.5}),
    )
    path = tmp_path / "cache.safetensors"
    save_cache(chosen, path)
    loaded = load_cache(path)
    assert (loaded.alpha, loaded.beta, loaded.ensemble) == (chosen.alpha, chosen.beta, chosen.ensemble)
    assert (loaded.class_names, loaded.encoders) == (chosen.class_names, chosen.encoders)
    assert torch.equal(loaded.logits(features), chosen.logits(features))
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_saved_cache_has_the_mode_of_any_new_file(tmp_path):
    cache, _, _ = make()
    before = os.umask(0o027)
    try:
        save_cache(cache, tmp_path / "cache.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache.safetensors").stat().st_mode) == 0o640


def test_errors_of_loading_name_the_cause(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="no cache at"):
        load_cache(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a cafo-cache-1"):
        load_cache(tmp_path / "other.safetensors")


def test_shapes_that_do_not_fit_are_errors():
    cache, features, _ = make()
    with pytest.raises(ValueError, match="class list"):
        replace(cache, class_names=("a", "b"))
    with pytest.raises(ValueError, match="21 labels need keys"):
        replace(cache, keys={"clip": cache.keys["clip"][:5]})
    with pytest.raises(ValueError, match="dino"):
        cache.logits({"clip": features["clip"]})


@pytest.mark.parametrize("content", ["cut", "pointer", "nothing", "headerless", "nan"])
def test_a_damaged_cache_is_named_with_the_way_out(tmp_path, content):
    path, (cache, _, _) = tmp_path / "cache.safetensors", make()
    save_cache(cache, path)
    message = r"cache\.safetensors is no whole cafo-cache-1 file .*bytes\); copy it again"
    if content == "nan":
        cache.keys["clip"][3, 1] = math.nan
        save_cache(cache, path)
        message = r"cache\.safetensors: keys\.clip hold NaN"
    elif content == "headerless":
        save_file({"labels": cache.labels}, path, {"format": "cafo-cache-1"})
    elif content == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
        message = "is a Git LFS pointer, not the cache itself"
    else:
        path.write_bytes(path.read_bytes()[: 300 if content == "cut" else 0])
    with pytest.raises(CafoError, match=message):
        load_cache(path)
