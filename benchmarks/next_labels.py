"""Measure what the next labels are worth: label some more images, chosen in several ways, and score the cache anew.

    python -m benchmarks.next_labels FEATURES.npz [--seeds 10] [--start 2] [--more 27 54 108]

The file of features is that of `benchmarks.selection`. For every seed, K images of each class are labelled at first;
the rest of the pool is unlabelled. A number of them is chosen by each of these rules, gets its true labels and joins
the cache, whose keys stay untrained; α and β are chosen by leave-one-out before and after.

random          at random
distance        the image farthest from all that is labelled or taken
margin          the smallest difference of the two largest probabilities, copies and neighbours included
cafo            `cafo.inspection.choose_next_labels`: uncertainty times distance
cafo, entropy   the same by the entropy

Prints the mean test accuracy over seeds in percent.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.selection import Images, load, make_parser, untrained_cache
from cafo.cache import Cache, accuracy
from cafo.calibration import calibrate
from cafo.inspection.next_labels import NextLabel, choose_next_labels
from cafo.key_training import KeyTraining
from cafo.selection import Choosing, select


def main() -> None:
    parser = make_parser(__doc__, seeds=10)
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=int, default=2)
    parser.add_argument("--more", type=int, nargs="+", default=[27, 54, 108])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = load(given.data)
    found: dict[tuple[int, str], list[float]] = {}
    for seed in range(given.seeds):
        for key, value in measure(images, given.start, given.more, seed).items():
            found.setdefault(key, []).append(value)
    for (more, rule), values in found.items():
        print(f"{more:>5} more  {rule:<14}{100 * statistics.mean(values):7.2f}", flush=True)


def measure(images: Images, start: int, numbers: list[int], seed: int) -> dict[tuple[int, str], float]:
    """Test accuracies by number of new labels and rule; those without new labels by `start`."""
    rng = torch.Generator().manual_seed(seed)
    pool = images.pool[torch.randperm(len(images.pool), generator=rng)]
    classes = range(images.classifier.shape[1])
    few = torch.cat([pool[images.labels[pool] == label][:start] for label in classes])
    rest = pool[~torch.isin(pool, few)]
    cache, temperature = fit(images, few, seed)
    logits = cache.logits({name: f[rest] for name, f in images.plain.items()})
    probabilities = (logits / temperature).softmax(dim=1)
    features = {name: f[rest] for name, f in images.plain.items()}
    labelled = {name: f[few] for name, f in images.plain.items()}
    found = {(0, "start"): score(images, few, seed)}
    for number in numbers:
        even = torch.full_like(probabilities, 1 / probabilities.shape[1])
        top = probabilities.topk(2, dim=1).values
        chosen = {
            "random": torch.randperm(len(rest), generator=rng)[:number],
            "distance": rows(choose_next_labels(even, features, number, labelled=labelled)),
            "margin": (top[:, 0] - top[:, 1]).argsort(stable=True)[:number],
            "cafo": rows(choose_next_labels(probabilities, features, number, labelled=labelled)),
            "cafo, entropy": rows(choose_next_labels(probabilities, features, number, labelled=labelled, by="entropy")),
        }
        found |= {(number, rule): score(images, torch.cat([few, rest[at]]), seed) for rule, at in chosen.items()}
    return found


def fit(images: Images, labelled: Tensor, seed: int) -> tuple[Cache, float]:
    """The untrained cache of some images, with chosen α and β, and the temperature of its probabilities."""
    cache, views, train = untrained_cache(images, labelled)
    choosing = Choosing(grid=replace(images.grid, steps=40, refinements=1), estimate=False)
    selected = select(cache, views, "leave_one_out", KeyTraining(seed=seed, epochs=0), choosing, train=train)
    held_out = selected.images
    assert held_out is not None
    logits = held_out.combine(selected.cache.beta, selected.cache.ensemble).logits(selected.cache.alpha)
    return selected.cache, calibrate(logits, held_out.labels).temperature


def score(images: Images, labelled: Tensor, seed: int) -> float:
    """Test accuracy of the cache of some images."""
    cache, _ = fit(images, labelled, seed)
    features = {name: f[images.others] for name, f in images.plain.items()}
    return accuracy(cache.logits(features), images.labels[images.others])


def rows(chosen: list[NextLabel]) -> Tensor:
    """The numbers of the chosen images."""
    return torch.tensor([one.image for one in chosen])


if __name__ == "__main__":
    main()
