"""Measure how much faster the exact search is than a grid loop.

    python benchmarks/cafo_search.py --scale caltech101 [--scale sun397] [--threads 2] [--json]

Random unit features with some class structure, at the sizes of a dataset: validation images × keys × classes, CLIP
1024 and DINO 2048 wide. Both searches answer the same question on the same tensors in the same process:

naive   200 β × 20 α. For every pair it computes what the reference loop computes: affinities of both sources, φ, the
        product with one-hot values, 100 f W, eq. 8-9, accuracy. A random part of the pairs is timed (`--part`) and
        scaled to 4,000.
shared  the same loop with affinities and 100 f W computed once before it, a cost that is counted. It shows how much of
        the gain comes from that alone.
exact   `cafo.search.search` at its defaults: the same 200 values of β, two refinements around the best, every α ≥ 0;
        the time includes affinities and 100 f W. Median of three.

With `--json` the last line printed for each scale is `{"scale": …, "exact_s": …, "naive_s": …, …}`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.held_out import HeldOutFeatures, KeySet
from cafo.search import search
from cafo.search_grid import BetaGrid


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of one dataset at 16 shots."""

    classes: int
    keys_per_class: int
    images: int
    required_ratio: int


SCALES = {
    "caltech101": Scale(classes=100, keys_per_class=17, images=1649, required_ratio=200),
    "sun397": Scale(classes=397, keys_per_class=24, images=3970, required_ratio=500),
}
WIDTHS = {"clip": 1024, "dino": 2048}
BETAS, ALPHAS = 200, 20


def make(scale: Scale, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Keys, features, classifier, key labels, image labels: noisy copies of one random direction per class."""
    generator = torch.Generator().manual_seed(seed)
    key_labels = torch.arange(scale.classes).repeat_interleave(scale.keys_per_class)
    labels = torch.randint(scale.classes, (scale.images,), generator=generator)
    keys, features = {}, {}
    for name, width in WIDTHS.items():
        centres = torch.randn(scale.classes, width, generator=generator)
        noise = 6.0 if name == "clip" else 8.0
        keys[name] = F.normalize(
            centres[key_labels] + noise * torch.randn(len(key_labels), width, generator=generator), dim=1
        )
        features[name] = F.normalize(
            centres[labels] + noise * torch.randn(scale.images, width, generator=generator), dim=1
        )
        if name == "clip":
            classifier = F.normalize(centres + 18 * torch.randn(scale.classes, width, generator=generator), dim=1).T
    return keys, features, classifier, key_labels, labels


def as_held_out(
    keys: dict[str, Tensor], features: dict[str, Tensor], classifier: Tensor, key_labels: Tensor, labels: Tensor
) -> HeldOutFeatures:
    """What `make` returns, as the images that a choice is made on."""
    return HeldOutFeatures(
        features=features,
        rows=torch.arange(len(labels), device=labels.device),
        labels=labels,
        key_sets=[KeySet(keys)],
        key_labels=key_labels,
        classifier=classifier,
        zero_shot_source="clip",
    )


def one_pair(
    affinities: list[Tensor], values: Tensor, zero_shot: Tensor, labels: Tensor, alpha: float, beta: float
) -> float:
    """Accuracy at one (α, β) by eq. 6-9 with one-hot values."""
    base = (zero_shot - zero_shot.mean(1, keepdim=True)) / zero_shot.std(1, keepdim=True)
    z = []
    for a in affinities:
        p = torch.exp(-beta * (1 - a)) @ values
        z.append((p - p.mean(1, keepdim=True)) / p.std(1, keepdim=True))
    weights = torch.softmax(torch.stack([(zi * base).sum(1) for zi in z]), dim=0)
    logits = zero_shot + alpha * sum(w[:, None] * zi for w, zi in zip(weights, z, strict=True))
    return float((logits.argmax(1) == labels).float().mean())


def measure(name: str, part: int, seed: int) -> dict[str, float | str | int]:
    """Time the three searches at one scale."""
    scale = SCALES[name]
    keys, features, classifier, key_labels, labels = make(scale, seed)
    grid = BetaGrid()
    pairs = [(alpha, beta) for beta in grid.values() for alpha in (0.1 + 4.9 * i / ALPHAS for i in range(ALPHAS))]
    assert len(pairs) == BETAS * ALPHAS
    sample = random.Random(seed).sample(pairs, part)
    values = F.one_hot(key_labels, scale.classes).float()

    def reference_pair(alpha: float, beta: float) -> float:
        affinities = [features[n] @ keys[n].T for n in keys]
        return one_pair(affinities, values, 100 * features["clip"] @ classifier, labels, alpha, beta)

    def exact() -> tuple[float, float]:
        result = search(as_held_out(keys, features, classifier, key_labels, labels), grid=grid)
        return result.accuracy, result.beta

    reference_pair(*sample[0])  # warm caches and thread pools for all three
    start = time.perf_counter()
    naive_best = max(reference_pair(*pair) for pair in sample)
    naive_s = (time.perf_counter() - start) * len(pairs) / part

    start = time.perf_counter()
    affinities, zero_shot = [features[n] @ keys[n].T for n in keys], 100 * features["clip"] @ classifier
    once = time.perf_counter() - start
    start = time.perf_counter()
    for pair in sample:
        one_pair(affinities, values, zero_shot, labels, *pair)
    shared_s = once + (time.perf_counter() - start) * len(pairs) / part
    del affinities, zero_shot

    times = []
    for _ in range(3):  # a short measurement, which one pause of the machine would distort
        start = time.perf_counter()
        accuracy, beta = exact()
        times.append(time.perf_counter() - start)
    exact_s = statistics.median(times)
    return {
        "scale": name,
        "exact_s": round(exact_s, 3),
        "naive_s": round(naive_s, 1),
        "ratio": round(naive_s / exact_s),
        "required_ratio": scale.required_ratio,
        "shared_s": round(shared_s, 1),
        "shared_ratio": round(shared_s / exact_s),
        "exact_accuracy": round(accuracy, 5),
        "exact_beta": round(beta, 4),
        "sampled_naive_accuracy": round(naive_best, 5),
        "pairs_timed": part,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", action="append", choices=sorted(SCALES), help="repeatable; default: both")
    parser.add_argument("--part", type=int, default=20, help="pairs of the naive grid to time, of 4,000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON line per scale and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.scale or sorted(SCALES):
        result = measure(name, options.part, options.seed)
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        print(f"{name}: exact {result['exact_s']} s, naive {result['naive_s']} s: {result['ratio']} times faster")
        print(f"  (a loop that shares affinities: {result['shared_s']} s, {result['shared_ratio']} times)")
        print(
            f"  accuracy {result['exact_accuracy']} exact, {result['sampled_naive_accuracy']} best of the timed pairs"
        )


if __name__ == "__main__":
    main()
