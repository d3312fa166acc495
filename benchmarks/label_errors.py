"""Measure how well wrong labels are found: flip some, and order the images by how suspicious their labels are.

    python -m benchmarks.label_errors FEATURES.npz [--seeds 10] [--shots 4 8 16] [--flipped 0.05] [--toward near]

The file of features is that of `benchmarks.selection`. For every seed, K images of each class are drawn, and the labels
of a share of them are flipped: to any other class, or to the class whose text is most like that of the true one. On
these images, the wrong labels included, a cross-fit chooses α and β. Then the images are put in these orders:

random          at random
loss, trained   by the loss of a logistic regression that was trained on all these images and labels
loss, held out  by its loss on the images of each of five folds, trained on the others
text            by the margin of p_ZS alone, which no label enters
trained keys    by the margin of CaFo's trained keys, which have seen all labels
cafo            by the margin of `cafo.inspection.check_training_labels`: each image without its own key

Prints for each order, as means over seeds in percent: `precision`, the wrong labels among the first F images of the
order, where F is the number of flipped labels (recall is the same number there); `recall x2`, the share of all wrong
labels among the first 2 F; `average`, the average precision. The last line of each K says the same of those that the
finder lists as suspects: how many there are, precision and recall.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from benchmarks.selection import Images, draw, load, make_parser, untrained_cache
from cafo.inspection.label_errors import check_labels, check_training_labels
from cafo.key_training import KeyTraining
from cafo.selection import Choosing, select

FOLDS = 5


def main() -> None:
    parser = make_parser(__doc__, seeds=10, shots=(4, 8, 16))
    parser.add_argument("data", type=Path)
    parser.add_argument("--flipped", type=float, default=0.05)
    parser.add_argument("--toward", choices=("any", "near"), default="any")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = load(given.data)
    print(f"{'K':<4}{'order':<16}{'precision':>10}{'recall x2':>10}{'average':>10}")
    for shots in given.shots:
        orders: dict[str, list[tuple[float, float, float]]] = {}
        listed = []
        for seed in range(given.seeds):
            suspicions, wrong, suspects = measure(images, shots, seed, given.flipped, given.toward)
            for name, suspicion in suspicions.items():
                orders.setdefault(name, []).append(score(suspicion, wrong))
            found = float(wrong[suspects].sum())
            listed.append((float(len(suspects)), 100 * found / len(suspects), 100 * found / float(wrong.sum())))
        for name, rows in orders.items():
            means = "".join(f"{100 * statistics.mean(values):10.1f}" for values in zip(*rows, strict=True))
            print(f"{shots:<4}{name:<16}{means}")
        number, precision, recall = (statistics.mean(values) for values in zip(*listed, strict=True))
        print(f"{shots:<4}suspects: {number:.1f}, precision {precision:.1f}, recall {recall:.1f}", flush=True)


def measure(
    images: Images, shots: int, seed: int, share: float, toward: str
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Flip labels at one K and seed, and judge them.

    Returns:
        order → (B,), the larger the likelier the label is wrong; (B,) bool, which labels are; the listed suspects.
    """
    few, _, _ = draw(images, shots, seed)
    rng = torch.Generator().manual_seed(1000 + seed)
    classes = images.classifier.shape[1]
    flipped = torch.randperm(len(few), generator=rng)[: round(share * len(few))]
    labels = images.labels.clone()
    others = (images.labels[few] + torch.randint(1, classes, (len(few),), generator=rng)) % classes
    if toward == "near":
        alike = images.classifier.T @ images.classifier
        others = alike.fill_diagonal_(-1).argmax(dim=1)[images.labels[few]]
    labels[few[flipped]] = others[flipped]
    wrong = torch.zeros(len(few), dtype=torch.bool)
    wrong[flipped] = True

    cache, views, train = untrained_cache(replace(images, labels=labels), few)
    choosing = Choosing(grid=images.grid, estimate=False)
    trained = select(cache, views, "crossfit", KeyTraining(seed=seed), choosing, train=train).cache
    check = check_training_labels(replace(trained, keys=cache.keys), train)
    in_sample = check_labels(trained.logits(train.features), cache.labels)
    suspicions = {
        "random": torch.rand(len(few), generator=rng),
        **_losses(train.features["clip"].numpy(), cache.labels.numpy(), seed),
        "text": -check_labels(cache.zero_shot(train.features), cache.labels).margins,
        "trained keys": -in_sample.margins,
        "cafo": -check.margins.nan_to_num(nan=torch.inf),
    }
    return suspicions, wrong, check.suspects()


def _losses(features: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Return the loss of a logistic regression on each image: of one trained on all, and of one trained without it."""
    model = LogisticRegression(C=100.0, max_iter=500)
    in_sample = model.fit(features, labels).predict_log_proba(features)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    held_out = cross_val_predict(model, features, labels, cv=folds, method="predict_log_proba")
    rows, columns = np.arange(len(labels)), np.searchsorted(np.unique(labels), labels)
    return {
        "loss, trained": -torch.from_numpy(in_sample[rows, columns]),
        "loss, held out": -torch.from_numpy(held_out[rows, columns]),
    }


def score(suspicion: Tensor, wrong: Tensor) -> tuple[float, float, float]:
    """Return the precision among the first F images, the recall among the first 2 F, and the average precision."""
    order, number = suspicion.argsort(descending=True, stable=True), int(wrong.sum())
    found = wrong[order].float()
    average = average_precision_score(wrong.numpy(), suspicion.nan_to_num(neginf=-1e9, posinf=1e9).numpy())
    return float(found[:number].mean()), float(found[: 2 * number].sum()) / number, float(average)


if __name__ == "__main__":
    main()
