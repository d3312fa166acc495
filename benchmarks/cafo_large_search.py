"""Measure the memory and the time of a search at ImageNet's size, against its matrix products alone.

    python -m benchmarks.cafo_large_search                                   # 1,000 classes, 50,000 images
    python -m benchmarks.cafo_large_search --classes 200 --images 5000 --check
    python -m benchmarks.cafo_large_search --classes 500 --crossfit          # one epoch of key training, in five folds

Random unit features with some class structure, as `benchmarks/cafo_search.py` makes them, CLIP 1024 and DINO 2048 wide,
24 keys a class (16 shots and 8 generated images). The validation images' features are written to a file, which is then
memory-mapped.

products  the affinities of all images with all keys, p_ZS, block by block, of which nothing is kept: what any search
          that is told neither the affinities nor what to leave out has to compute
search    the whole choice at its defaults, from features to α, β and ensemble, products included: `--ensembles one` is
          `Ensemble()`; `--ensembles six` lets each source and p_ZS be left out, as a sweep does by default
estimate  with `--estimate`: the estimate of the accuracy, five more searches on images that have been read

CPU seconds of all threads are compared, since other programs may use the machine; the products are measured before the
search and after it, and the smaller figure is taken. Memory is the peak of what the process holds itself, without the
pages of mapped files (RssAnon), read four times a second.

With `--crossfit`, keys are trained without each of five folds instead, for the memory that this takes; their views are
their own features. With `--check`, the chosen values' correct images are counted by eq. 6-9 in float64 on all images.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import Cache
from cafo.cross_fit import TrainingImages, cross_fit
from cafo.ensemble import Ensemble
from cafo.estimate import estimate_accuracy
from cafo.held_out import HeldOutFeatures, KeySet, blocks_of
from cafo.key_training import KeyTraining
from cafo.reduced import ReducedImages
from cafo.search import reduce_for_search, search_reduced, weight_grid
from cafo.search_grid import BetaGrid

WIDTHS = {"clip": 1024, "dino": 2048}
NOISE = {"clip": 6.0, "dino": 8.0}
TEXT_NOISE = 18.0
_BLOCK = 1000


def make(folder: Path, classes: int, keys_per_class: int, images: int, seed: int) -> HeldOutFeatures:
    """Make keys and a classifier in memory, and the features of images in files: noisy copies of class centres."""
    generator = torch.Generator().manual_seed(seed)
    key_labels = torch.arange(classes).repeat_interleave(keys_per_class)
    labels = torch.randint(classes, (images,), generator=generator)
    keys, features, classifier = {}, {}, torch.empty(0)
    for name, width in WIDTHS.items():
        centres = torch.randn(classes, width, generator=generator)

        def noisy(of: Tensor, name: str = name, width: int = width, centres: Tensor = centres) -> Tensor:
            return F.normalize(centres[of] + NOISE[name] * torch.randn(len(of), width, generator=generator), dim=1)

        keys[name] = torch.cat([noisy(some) for some in key_labels.split(_BLOCK)])
        path = folder / f"{name}.bin"
        with path.open("wb") as file:
            for some in labels.split(_BLOCK):
                noisy(some).numpy().tofile(file)
        features[name] = torch.from_numpy(np.memmap(path, np.float32, "r+", shape=(images, width)))
        if name == "clip":
            noise = TEXT_NOISE * torch.randn(classes, width, generator=generator)
            classifier = F.normalize(centres + noise, dim=1).T.contiguous()
    return HeldOutFeatures(
        features=features,
        rows=torch.arange(images),
        labels=labels,
        key_sets=[KeySet(keys)],
        key_labels=key_labels,
        classifier=classifier,
        zero_shot_source="clip",
    )


@dataclass
class Measured:
    """The time and memory that a step took."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mib: float = 0.0


def anonymous_mib() -> float:
    """Return the process's memory that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@contextmanager
def measure() -> Iterator[Measured]:
    """Yield what is filled in at the end."""
    found, done = Measured(peak_mib=anonymous_mib()), threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            found.peak_mib = max(found.peak_mib, anonymous_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield found
    finally:
        found.cpu_s, found.wall_s = time.process_time() - cpu, time.perf_counter() - wall
        done.set()
        thread.join()


def products(images: HeldOutFeatures) -> Measured:
    """Compute the products alone."""
    with measure() as found:
        for _ in blocks_of(images):
            pass
    return found


def show(name: str, found: Measured, floor: float | None = None) -> None:
    """Print a line about a step."""
    ratio = "" if floor is None else f"  {found.cpu_s / floor:5.2f} × products"
    print(f"{name:22s} {found.cpu_s:8.1f} s CPU  {found.wall_s:8.1f} s{ratio}  {found.peak_mib:6.0f} MiB", flush=True)


def ensembles_of(which: str) -> list[Ensemble]:
    """Return the candidate ensembles."""
    one = Ensemble()
    return [one] if which == "one" else weight_grid(one, tuple(WIDTHS), scales=(1.0, 0.0), drop_zero_shot=True)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure every step."""
    images = make(folder, options.classes, options.keys, options.images, options.seed)
    print(f"{options.classes} classes × {options.keys} keys, {options.images} images, {options.threads} threads")
    print(f"before: {anonymous_mib():.0f} MiB, of which the keys are {_mib(images.key_sets[0].keys.values()):.0f} MiB")
    first, grid, ensembles = products(images), BetaGrid(), ensembles_of(options.ensembles)
    with measure() as reading:
        reduced = reduce_for_search(images, grid)
    with measure() as searching:
        best = search_reduced(reduced, grid=grid, ensembles=ensembles, rule=options.rule)
    second = products(images)
    floor = min(first.cpu_s, second.cpu_s)
    show("products, before", first)
    show("products, after", second)
    show("reading the images", reading, floor)
    show(f"the search, {len(ensembles)} ensembles", searching, floor)
    both = Measured(reading.cpu_s + searching.cpu_s, reading.wall_s + searching.wall_s)
    both.peak_mib = max(reading.peak_mib, searching.peak_mib)
    show("both", both, floor)
    columns = sum(group.zero_shot.numel() for group in reduced.groups) / options.images
    print(
        f"{columns:.1f} columns per image, {len(reduced.groups[0].nodes)} nodes, {_mib(_tensors(reduced)):.0f} MiB kept"
    )
    print(f"chosen: α {best.alpha:.6g}, β {best.beta:.6g}, {best.correct} of {best.total} correct")
    if options.estimate:
        with measure() as estimating:
            estimate = estimate_accuracy(reduced, grid, ensembles, options.rule, 5, options.seed)
        show("the estimate", estimating, floor)
        print(estimate)
    if options.check:
        print("counted by eq. 6-9:", images.count_correct(best.alpha, best.beta, best.ensemble))


def run_cross_fit(options: argparse.Namespace, folder: Path) -> None:
    """Measure one epoch of key training in five folds."""
    images = make(folder, options.classes, options.keys, 1, options.seed)
    keys, labels = images.key_sets[0].keys, images.key_labels
    names = tuple(map(str, range(options.classes)))
    cache = Cache(keys=keys, labels=labels, classifier=images.classifier, class_names=names)
    train = TrainingImages(features=keys, rows=torch.arange(len(labels)))
    print(f"{options.classes} classes × {options.keys} keys, {options.threads} threads")
    print(f"before: {anonymous_mib():.0f} MiB, of which the keys are {_mib(keys.values()):.0f} MiB")
    with measure() as found:
        views = {name: k[None] for name, k in keys.items()}
        cross_fit(cache, views, train, KeyTraining(epochs=1), 5, "loss")
    show("cross-fit, one epoch", found)


def _tensors(reduced: ReducedImages) -> Iterator[Tensor]:
    for group in reduced.groups:
        yield from (part for part in group if isinstance(part, Tensor))


def _mib(tensors: Iterable[Tensor]) -> float:
    return sum(t.nbytes for t in tensors) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=24, help="keys of a class")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--ensembles", choices=("one", "six"), default="one")
    parser.add_argument("--rule", choices=("highest", "near_best"), default="highest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimate", action="store_true", help="also estimate the accuracy")
    parser.add_argument("--crossfit", action="store_true", help="train keys in five folds instead")
    parser.add_argument("--check", action="store_true", help="count the correct images directly")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        (run_cross_fit if options.crossfit else run)(options, Path(folder))


if __name__ == "__main__":
    main()
