import math
import os
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import cafo.cache
from cafo.cache import (
    Cache,
    accuracy,
    affinity,
    class_logits,
    count_correct,
    load_cache,
    mean_key,
    nearest_affinity,
    save_cache,
)
from cafo.ensemble import Ensemble, standardise
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


def test_a_key_that_is_left_out_counts_for_nothing_even_if_all_are():
    a = torch.tensor([[0.5, -math.inf], [-math.inf, -math.inf], [-0.25, -math.inf]])
    assert nearest_affinity(a).tolist() == [0.5, 0.0]
    expected = torch.tensor([[1.0, 0.0, math.exp(-1.5)], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(class_logits(a, torch.arange(3), 3, 2.0), expected)


def test_any_number_of_images_is_predicted_in_blocks(monkeypatch):
    cache, features, _ = make()
    whole, product, sizes = cache.logits(features), cafo.cache.affinity, []

    def counted(keys, rows):
        sizes.append(len(rows))
        return product(keys, rows)

    monkeypatch.setattr(cafo.cache, "affinity", counted)
    for rows, affinities, size in ((5, 1 << 23, 5), (2048, 3 * len(cache.labels), 3), (2048, 1, 1)):
        monkeypatch.setattr(cafo.cache, "_ROWS_AT_ONCE", rows)
        monkeypatch.setattr(cafo.cache, "_AFFINITIES_AT_ONCE", affinities)
        sizes.clear()
        torch.testing.assert_close(cache.logits(features), whole, rtol=1e-4, atol=1e-4)
        assert max(sizes) == size
    assert cache.logits({name: f[:0] for name, f in features.items()}).shape == (0, N)


def test_correct_images_are_counted_by_the_first_of_the_largest_logits():
    logits = torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 5.0, 5.0]])
    labels = torch.tensor([1, 0, 1, 2])
    assert (count_correct(logits, labels), accuracy(logits, labels)) == (2, 0.5)
    assert accuracy(logits[1:2], labels[1:2]) == 1
    assert accuracy(logits[:0], labels[:0]) == 0


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


def test_a_cache_starts_at_the_alpha_and_beta_of_tip_adapters_reference():
    cache, _, _ = make()
    new = Cache(keys=cache.keys, labels=cache.labels, classifier=cache.classifier, class_names=cache.class_names)
    assert (new.alpha, new.beta) == (1.0, 5.5)


def test_mean_key():
    views = torch.randn(3, 5, 11)
    torch.testing.assert_close(mean_key(views), F.normalize((views[0] + views[1] + views[2]) / 3, dim=1))


def test_a_saved_cache_is_read_back_equal(tmp_path):
    cache, features, _ = make()
    chosen = replace(
        cache,
        alpha=1 / 3,
        beta=0.1 + 0.2,
        encoders={"clip": "RN50-abc"},
        ensemble=Ensemble(sources=("clip", "dino"), temperature=3.0, scales={"dino": 0.5}),
        key_names=tuple(f"{label}/é {row}.jpg" for row, label in enumerate(cache.labels.tolist())),
    )
    path = tmp_path / "cache.safetensors"
    save_cache(chosen, path)
    loaded = load_cache(path)
    assert (loaded.alpha, loaded.beta, loaded.ensemble) == (chosen.alpha, chosen.beta, chosen.ensemble)
    assert (loaded.class_names, loaded.encoders) == (chosen.class_names, chosen.encoders)
    assert loaded.key_names == chosen.key_names
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
    with pytest.raises(CafoError, match="names of images or none, got 1"):
        replace(cache, key_names=("a.jpg",))
    with pytest.raises(ValueError, match="class list"):
        replace(cache, class_names=("a", "b"))
    one_class = replace(cache, labels=torch.zeros_like(cache.labels))
    for label in (-1, N):
        with pytest.raises(ValueError, match=f"but the class list has {N} names"):
            replace(one_class, labels=torch.full_like(cache.labels, label))
    for classifier in (cache.classifier[:, :3], cache.classifier[..., None]):
        with pytest.raises(ValueError, match=r"a classifier for 7 classes has shape \(C, 7\)"):
            replace(cache, classifier=classifier)
    with pytest.raises(ValueError, match="21 labels need keys"):
        replace(cache, keys={"clip": cache.keys["clip"][:5]})
    with pytest.raises(ValueError, match="dino"):
        cache.logits({"clip": features["clip"]})


@pytest.mark.parametrize("content", ["cut", "pointer", "nothing", "headerless", "nan", "later"])
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
    elif content == "later":  # an ensemble with a field that this version does not know
        with safe_open(path, "pt") as file:
            header = file.metadata()
        header["ensemble"] = header["ensemble"].replace("{", '{"later": 1, ', 1)
        save_file({name: tensor.contiguous() for name, tensor in load_file(path).items()}, path, header)
    elif content == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
        message = "is a Git LFS pointer, not the cache itself"
    else:
        path.write_bytes(path.read_bytes()[: 300 if content == "cut" else 0])
    with pytest.raises(CafoError, match=message):
        load_cache(path)
