"""Measure what a source that says nothing costs a cascade.

    python -m benchmarks.useless_source FEATURES.npz [--seeds 5]

FEATURES.npz is what `benchmarks.selection` reads; its features are the second source here. In CLIP's place is a source
that says nothing: random features, and a random zero-shot classifier, as of an untrained CLIP. For every K it prints
the mean test accuracy of

alone         the good source's cache by itself
whole         the cascade of both sources with p_ZS, α and β chosen on 100 validation images: nothing can be left out
val           the same, where the search may leave out sources and p_ZS
crossfit      the same on the K shots alone
"""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.selection import Images, draw, load, make_parser, untrained_cache
from cafo.cache import accuracy
from cafo.ensemble import NOTHING, Ensemble
from cafo.key_training import KeyTraining
from cafo.search import weight_grid
from cafo.selection import Choosing, select

WIDTH = 64


def main() -> None:
    parser = make_parser(__doc__, seeds=5, shots=(2, 4, 16))
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = load(given.data)
    for shots in given.shots:
        rows = [measure(images, shots, seed) for seed in range(given.seeds)]
        means = {name: 100 * statistics.mean(row[name] for row in rows) for name in rows[0]}
        print(f"K={shots}:", ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()), flush=True)


def beside_nothing(images: Images, seed: int) -> Images:
    """The images with a useless source in CLIP's place and the good one as DINO's."""
    rng = torch.Generator().manual_seed(seed)
    good = images.plain["clip"]
    noise = F.normalize(torch.randn(len(good), WIDTH, generator=rng), dim=1)
    return replace(
        images,
        plain={"clip": noise, "dino": good},
        views={"clip": noise[None], "dino": images.views["clip"][:1]},
        classifier=F.normalize(torch.randn(WIDTH, images.classifier.shape[1], generator=rng), dim=0),
    )


def measure(images: Images, shots: int, seed: int) -> dict[str, float]:
    """Test accuracies at one K and seed."""
    both = beside_nothing(images, seed)
    few, val, test = draw(both, shots, seed)
    cache, views, train = untrained_cache(both, few)
    on_val = ({name: f[val] for name, f in both.plain.items()}, both.labels[val])
    features, labels = {name: f[test] for name, f in both.plain.items()}, both.labels[test]
    alone = Ensemble(baseline=NOTHING, sources=("dino",))
    every = weight_grid(Ensemble(), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)
    training, grid = KeyTraining(seed=seed), both.grid
    old = Choosing(grid=grid, rule="highest")
    new = Choosing(grid=grid, ensembles=tuple(every), estimate=False)
    ways = {
        "alone": select(
            replace(cache, ensemble=alone), views, "val", training, replace(old, ensembles=(alone,)), val=on_val
        ),
        "whole": select(cache, views, "val", training, old, val=on_val),
        "val": select(cache, views, "val", training, new, val=on_val),
        "crossfit": select(cache, views, "crossfit", training, new, train=train),
    }
    return {name: accuracy(chosen.cache.logits(features), labels) for name, chosen in ways.items()}


if __name__ == "__main__":
    main()
