"""Measure how well α and β are chosen from few labels: on validation images, or without any.

    python -m benchmarks.selection FEATURES.npz [--seeds 10] [--shots 1 2 4]
    python -m benchmarks.selection runs/demo/world                 # the demo's digits, encoded on first use
    python -m benchmarks.selection FEATURES.npz WORLD --prior      # the figures that cafo/prior.py is made of

An argument is a file of features: `features` (n, C), `labels`, `pool` (images that shots are drawn from; 100 of
the others are validation images, the rest test images) and `classifier` (C, N). Or it is the demo's folder of models
and scans. For every seed, K images of each class are drawn and the keys trained as the paper does; then α and β are
chosen in each of these ways, and the classifier is scored on test images:

default        α and β of the training
val            100 validation images, by the highest accuracy: the reference's way
val, near      100 validation images, by the rule of `cafo.near_best`
crossfit       on the K shots alone
leave one out  on the K shots alone, with untrained keys
prior          on no image
joined         the 100 validation images become training images too, and a cross-fit chooses: as many labels as `val`
best           the best of α, β and of all keys above on test, which nobody can choose: the ceiling

Prints the mean over seeds in percent, and writes every figure beside `--out` as JSON.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import Cache, accuracy, mean_key
from cafo.cross_fit import TrainingImages
from cafo.held_out import on_validation
from cafo.key_training import KeyTraining
from cafo.prior import ACCURACY_POWER, BETA, SCALE, SHOTS_POWER
from cafo.search import search
from cafo.search_grid import BetaGrid
from cafo.selection import Choosing, select

VAL = 100
VIEWS = 4
WAYS = ("val", "val, near", "crossfit", "leave one out", "prior", "joined")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Features of a data set's images, and who may be what."""

    plain: dict[str, Tensor]
    """source → (n, C)"""
    views: dict[str, Tensor]
    """source → (V, n, C)"""
    labels: Tensor
    pool: Tensor
    """rows that shots are drawn from"""
    others: Tensor
    """rows that are divided into validation and test images"""
    classifier: Tensor
    alpha: float
    """α of the training"""
    grid: BetaGrid


def main() -> None:
    parser = make_parser(__doc__, seeds=10)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--prior", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/selection.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.prior:
        curves = []
        for path in given.data:
            if path.is_file():
                curves += measure_prior(path.stem, load(path), given.seeds)
            else:
                curves += measure_prior("digits", load(path), given.seeds)
                curves += measure_prior("digits (CLIP alone)", load(path, ["clip"]), given.seeds)
        show_prior(curves)
        return
    for path in given.data:
        images = load(path)
        rows = []
        for shots in given.shots:
            for seed in range(given.seeds):
                rows.append({"data": str(path), "shots": shots, "seed": seed, **measure(images, shots, seed)})
            _show([row for row in rows if row["shots"] == shots], header=shots == given.shots[0])
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_stem(f"{given.out.stem}-{path.stem}").write_text(json.dumps(rows))


def make_parser(description: str, *, seeds: int, shots: Sequence[int] = (1, 2, 4, 8, 16)) -> argparse.ArgumentParser:
    """The options of every benchmark on such features, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--shots", type=int, nargs="+", default=shots)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def _show(rows: list[dict[str, Any]], *, header: bool) -> None:
    names = [name for name in rows[0] if name not in ("data", "shots", "seed")]
    if header:
        print("K   ", " ".join(f"{name:>13}" for name in names))
    known = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    cells = [f"{100 * statistics.mean(known[name]):13.2f}" if known[name] else " " * 13 for name in names]
    print(f"{rows[0]['shots']:<4}", " ".join(cells), flush=True)


def load(data: Path, sources: list[str] | None = None) -> Images:
    """Read a file of features, or the demo's folder with some of its encoders."""
    return _load_file(data) if data.is_file() else _load_digits(data, sources or ["clip", "dino"])


def _load_file(path: Path) -> Images:
    arrays = np.load(path)
    features = F.normalize(torch.from_numpy(arrays["features"]).float(), dim=1)
    pool = torch.from_numpy(arrays["pool"])
    return Images(
        plain={"clip": features},
        views={"clip": features[None]},
        labels=torch.from_numpy(arrays["labels"]).long(),
        pool=pool.nonzero()[:, 0],
        others=(~pool).nonzero()[:, 0],
        classifier=torch.from_numpy(arrays["classifier"]).float(),
        alpha=1.0,
        grid=BetaGrid(),
    )


def _load_digits(world: Path, names: Sequence[str]) -> Images:
    """Encode the demo's scans, or read their features, which are kept beside the demo's models."""
    path = world / "selection_features.pt"
    if not path.exists():
        torch.save(_encode_digits(world), path)
    kept = torch.load(path, weights_only=True)
    return Images(
        plain={name: kept[f"{name}.plain"] for name in names},
        views={name: kept[f"{name}.views"] for name in names},
        labels=kept["labels"],
        pool=torch.arange(int(kept["train"])),
        others=torch.arange(int(kept["train"]), len(kept["labels"])),
        classifier=kept["classifier"],
        alpha=8.0,  # the logit scale of the tiny CLIP is about 12, that of the real one 100
        grid=BetaGrid(high=50.0, steps=100),
    )


def _encode_digits(world: Path) -> dict[str, Tensor]:
    from cafo.datasets import load_split
    from cafo.encoders import EncoderSpec, load_encoder
    from cafo.images import load_image
    from cafo.prompt import template_prompts, zero_shot_classifier

    digits = load_split(world / "digits/split.json", world / "digits", templates=["a photo of the digit {}."])
    encoders = {
        "clip": load_encoder(EncoderSpec(kind="clip", name="tiny", weights=str(world / "clip"))),
        "dino": load_encoder(EncoderSpec(kind="timm", weights=str(world / "dino"))),
        "untrained": load_encoder(EncoderSpec(kind="timm", name=str(world / "dino"), weights="random:0")),
    }
    items = [*digits.train, *digits.val, *digits.open_test()]
    scans = [load_image(digits.image_root / item.path) for item in items]
    prompts = template_prompts(digits.templates, digits.class_names)
    found = {
        "labels": torch.tensor([item.label for item in items]),
        "train": torch.tensor(len(digits.train)),
        "classifier": zero_shot_classifier(encoders["clip"], prompts, digits.class_names).weights,
    }
    for name, encoder in encoders.items():
        plain = [encoder.preprocess(scan) for scan in scans]
        found[f"{name}.plain"] = torch.cat([encoder.encode_image(b) for b in torch.stack(plain).split(64)])
        views = []
        for view in range(VIEWS):
            seen = [
                encoder.preprocess.view(scan, item.path, view, 0, min_area=0.9, flips=False)
                for scan, item in zip(scans, items, strict=True)
            ]
            views.append(torch.cat([encoder.encode_image(b) for b in torch.stack(seen).split(64)]))
        found[f"{name}.views"] = torch.stack(views)
    return found


def draw(images: Images, shots: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of K training images of each class, of validation and of test images."""
    rng = torch.Generator().manual_seed(seed)
    pool = images.pool[torch.randperm(len(images.pool), generator=rng)]
    others = images.others[torch.randperm(len(images.others), generator=rng)]
    classes = range(images.classifier.shape[1])
    few = torch.cat([pool[images.labels[pool] == label][:shots] for label in classes])
    return few, others[:VAL], others[VAL:]


def untrained_cache(images: Images, rows: Tensor) -> tuple[Cache, dict[str, Tensor], TrainingImages]:
    """An untrained cache of some images, their views, and the images as a choice sees them."""
    views = {name: v[:, rows] for name, v in images.views.items()}
    cache = Cache(
        keys={name: mean_key(v) for name, v in views.items()},
        labels=images.labels[rows],
        classifier=images.classifier,
        class_names=tuple(map(str, range(images.classifier.shape[1]))),
        alpha=images.alpha,
    )
    plain = {name: f[rows] for name, f in images.plain.items()}
    return cache, views, TrainingImages(features=plain, rows=torch.arange(len(rows)))


def measure(images: Images, shots: int, seed: int) -> dict[str, float | None]:
    """Test accuracies of all ways at one K and seed; None for a way that K rules out."""
    few, val, test = draw(images, shots, seed)
    cache, views, train = untrained_cache(images, few)
    test_features, test_labels = {name: f[test] for name, f in images.plain.items()}, images.labels[test]
    on_val = ({name: f[val] for name, f in images.plain.items()}, images.labels[val])
    paper, untrained = KeyTraining(seed=seed), KeyTraining(seed=seed, epochs=0)
    near = Choosing(grid=images.grid, estimate=False)
    highest = replace(near, rule="highest")
    found = {
        "val": select(cache, views, "val", paper, highest, val=on_val),
        "val, near": select(cache, views, "val", paper, near, val=on_val),
        "prior": select(cache, views, "prior", paper, near, train=train),
    }
    if shots > 1:
        found["crossfit"] = select(cache, views, "crossfit", paper, near, train=train)
        found["leave one out"] = select(cache, views, "leave_one_out", untrained, near, train=train)
    joined, joined_views, joined_train = untrained_cache(images, torch.cat([few, val]))
    found["joined"] = select(joined, joined_views, "crossfit", paper, near, train=joined_train)
    test_accuracies = {
        name: accuracy(chosen.cache.logits(test_features), test_labels) for name, chosen in found.items()
    }
    by_default = replace(found["prior"].cache, alpha=cache.alpha, beta=cache.beta)
    coarse = replace(images.grid, steps=60, refinements=1)
    ceilings = [
        search(on_validation(keys, test_features, test_labels), grid=coarse).accuracy
        for keys in (cache, *(found[name].cache for name in ("val, near", "crossfit", "prior") if name in found))
    ]
    return {
        "zero-shot": accuracy(cache.zero_shot(test_features), test_labels),
        "default": accuracy(by_default.logits(test_features), test_labels),
        **{name: test_accuracies.get(name) for name in WAYS},
        "best": max(ceilings),
    }


RATIOS = tuple(np.geomspace(0.05, 50, 41).tolist())


class Curve(NamedTuple):
    """Test accuracy over α/s at β = 6, of one data set, K, quality of the zero-shot classifier, and seed."""

    data: str
    shots: int
    noise: float
    zero_shot: float
    """accuracy of p_ZS on test images"""
    share: float
    """accuracy of p_ZS on the labelled images, (correct + 1) / (images + 2), which is all that a prior may know"""
    accuracies: tuple[float, ...]

    def at(self, ratio: float) -> float:
        """Accuracy at any α/s, by interpolation."""
        return float(np.interp(math.log(ratio), np.log(RATIOS), self.accuracies))


def measure_prior(name: str, images: Images, seeds: int) -> list[Curve]:
    """Curves at one and four shots, with the zero-shot classifier as it is and with noise down to chance."""
    curves = []
    for shots, noise, seed in itertools.product((1, 4), (0.0, 1.0, 2.0, 4.0, 8.0, 100.0), range(seeds)):
        rng = torch.Generator().manual_seed(seed)
        direction = F.normalize(torch.randn(images.classifier.shape, generator=rng), dim=0)
        noisy = replace(images, classifier=F.normalize(images.classifier + noise * direction, dim=0))
        few, _, test = draw(noisy, shots, seed)
        cache, views, train = untrained_cache(noisy, few)
        trained = select(cache, views, "prior", KeyTraining(seed=seed), Choosing(), train=train).cache
        features, labels = {name: f[test] for name, f in noisy.plain.items()}, noisy.labels[test]
        known = trained.zero_shot(train.features)
        right = int((known.argmax(dim=1) == cache.labels).sum())
        parts, scale = replace(trained, beta=BETA).combine_in_blocks(features), float(known.std(dim=1).mean())
        accuracies = tuple(accuracy(parts.logits(ratio * scale), labels) for ratio in RATIOS)
        share = (right + 1) / (len(few) + 2)
        curves.append(Curve(name, shots, noise, accuracy(parts.base, labels), share, accuracies))
    return curves


def fit_prior(curves: Sequence[Curve]) -> tuple[float, float, float]:
    """Scale and powers of K and of the zero-shot accuracy that lose the least of each curve's best accuracy."""
    scales, shots_powers, powers = np.arange(0.25, 1.0, 0.05), (0.0, 1 / 6, 1 / 3, 1 / 2), np.arange(0.5, 2.01, 0.25)
    tried = itertools.product(scales.tolist(), shots_powers, powers.tolist())
    return min(tried, key=lambda values: loss_of_prior(curves, *values))


def loss_of_prior(curves: Sequence[Curve], scale: float, shots_power: float, power: float) -> float:
    """Mean loss of accuracy against the best α of each condition (mean over its seeds)."""
    losses = []
    for _, of_condition in itertools.groupby(curves, key=lambda curve: curve[:3]):
        group = list(of_condition)
        best = np.mean([curve.accuracies for curve in group], axis=0).max()
        expected = [curve.at(scale * curve.shots**shots_power / curve.share**power) for curve in group]
        losses.append(best - float(np.mean(expected)))
    return statistics.mean(losses)


def show_prior(curves: Sequence[Curve]) -> None:
    """Print the best α/s of each condition, and what is lost by a prior that was fitted with and without a data set."""
    for (name, shots, noise), of_condition in itertools.groupby(curves, key=lambda curve: curve[:3]):
        group = list(of_condition)
        mean = np.mean([curve.accuracies for curve in group], axis=0)
        near = [ratio for ratio, value in zip(RATIOS, mean, strict=True) if value >= mean.max() - 0.005]
        zero_shot = statistics.mean(curve.zero_shot for curve in group)
        print(
            f"{name}, {shots} shots, noise {noise:g}: zero-shot {zero_shot:.1%}, best {mean.max():.1%} at α/s "
            f"{RATIOS[int(mean.argmax())]:.2f}, within half a point from {near[0]:.2f} to {near[-1]:.2f}"
        )
    print("fitted on all (scale, power of K, power of the accuracy):", [round(v, 3) for v in fit_prior(curves)])
    print(f"its loss: {loss_of_prior(curves, *fit_prior(curves)):.2%}")
    shipped = loss_of_prior(curves, SCALE, SHOTS_POWER, ACCURACY_POWER)
    print(f"loss of cafo/prior.py: {shipped:.2%}")
    for name in dict.fromkeys(curve.data.split()[0] for curve in curves):
        others = [curve for curve in curves if not curve.data.startswith(name)]
        own = [curve for curve in curves if curve.data.startswith(name)]
        if others:
            values = fit_prior(others)
            lost = loss_of_prior(own, *values)
            print(f"fitted without {name}: {[round(v, 3) for v in values]}, loss on {name} {lost:.2%}")


if __name__ == "__main__":
    main()
