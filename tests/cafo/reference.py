"""CaFo's equations as slow and literal as possible: float64, explicit loops, one-hot values."""

from __future__ import annotations

import math

import torch

from cafo.alpha_intervals import accuracy_steps, correct_intervals, label_margins


def z_loop(row):
    """(p - mean) / std of one image's list of logits, unbiased."""
    n = len(row)
    mean = sum(row) / n
    std = math.sqrt(sum((x - mean) ** 2 for x in row) / (n - 1))
    return [(x - mean) / std for x in row]


def cache_logits_loop(keys, labels, features, num_classes, beta):
    """p = φ(f Fᵀ) L with φ(x) = exp(-β(1-x)), as nested lists (B, N)."""
    out = []
    for f in features.double().tolist():
        row = [0.0] * num_classes
        for key, label in zip(keys.double().tolist(), labels.tolist(), strict=True):
            x = sum(a * b for a, b in zip(f, key, strict=True))
            row[label] += math.exp(-beta * (1 - x))
        out.append(row)
    return out


def adaptive_loop(zero_shot, caches, alpha, temperature=1.0, scales=None):
    """Eq. 8-9 for one image at a time: lists (B, N) → (B, N)."""
    scales = scales or [1.0] * len(caches)
    out = []
    for b, base in enumerate(zero_shot):
        zb = z_loop(base)
        zs = [z_loop(cache[b]) for cache in caches]
        w = [sum(x * y for x, y in zip(z, zb, strict=True)) / temperature for z in zs]
        top = max(w)
        e = [math.exp(v - top) for v in w]
        share = [v / sum(e) for v in e]
        out.append(
            [
                base[n] + alpha * sum(s * c * z[n] for s, c, z in zip(share, scales, zs, strict=True))
                for n in range(len(base))
            ]
        )
    return out


def grid_loop(zero_shot, affinities, key_labels, labels, alphas, betas):
    """The grid search by one-hot products in float64: {(α, β): correct images}."""
    values = torch.nn.functional.one_hot(key_labels, zero_shot.shape[1]).double()
    base = zero_shot.double()
    zb = (base - base.mean(1, keepdim=True)) / base.std(1, keepdim=True)
    right = {}
    for beta in betas:
        z = []
        for a in affinities.values():
            p = torch.exp(-beta * (1 - a.double().T)) @ values
            z.append((p - p.mean(1, keepdim=True)) / p.std(1, keepdim=True))
        w = torch.softmax(torch.stack([(zi * zb).sum(1) for zi in z]), 0)
        fused = sum(wi[:, None] * zi for wi, zi in zip(w, z, strict=True))
        for alpha in alphas:
            right[alpha, beta] = int(((base + alpha * fused).argmax(1) == labels).sum())
    return right


def accuracy_path(base, term, labels):
    """Correct images for every α ≥ 0, one problem, repeated breakpoints left out: rising α from 0, and the count from
    each on."""
    low, high = correct_intervals(label_margins(base, labels), term, labels)
    breakpoints, correct = (rows[0] for rows in accuracy_steps(low[None], high[None]))
    starts_a_step = torch.cat([breakpoints[1:] > breakpoints[:-1], torch.ones(1, dtype=torch.bool)])
    kept = starts_a_step & breakpoints.isfinite()
    return breakpoints[kept].double(), correct[kept]


def problem(seed=0, classes=7, images=53, keys_per_class=3, widths=(11, 13), noise=0.8, ragged=False):
    """A small few-shot problem of distinct prime sizes: keys, features, classifier, key labels, labels."""
    g = torch.Generator().manual_seed(seed)
    key_labels = torch.arange(classes).repeat_interleave(keys_per_class)
    if ragged:
        key_labels = key_labels[torch.randperm(len(key_labels), generator=g)][:-4]
    labels = torch.randint(classes, (images,), generator=g)
    keys, features, classifier = {}, {}, None
    for name, width in zip(("clip", "dino", "third"), widths, strict=False):
        centres = torch.randn(classes, width, generator=g)
        samples = [centres[c] + noise * torch.randn(len(c), width, generator=g) for c in (key_labels, labels)]
        keys[name], features[name] = (torch.nn.functional.normalize(x, dim=1) for x in samples)
        if classifier is None:
            classifier = centres + 1.5 * torch.randn(classes, width, generator=g)
            classifier = torch.nn.functional.normalize(classifier, dim=1).T.contiguous()
    return keys, features, classifier, key_labels, labels
