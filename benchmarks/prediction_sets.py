"""Measure calibrated probabilities and the coverage of prediction sets on images that nothing was chosen on.

    python -m benchmarks.prediction_sets FEATURES.npz [--seeds 5] [--shots 2 4 8 16] [--select crossfit]
    python -m benchmarks.prediction_sets runs/demo/world

The features are those of `benchmarks.selection`. For every seed, K images of each class are drawn and the keys trained;
α, β, the temperature and the scores come from `--select`: crossfit, leave_one_out (untrained keys) or val (100
validation images). On the test images it prints the means over seeds of

accuracy        of the likeliest class, in percent
plain, ece      calibration error (15 bins of equal width) of the softmax of the logits, and of calibrated probabilities
coverage, size  for each coverage that is asked for: share of the test images whose class is in their set, in percent,
                the lowest of the seeds, and the mean number of classes of a set; a dash where the held-out images are
                too few
"""

import statistics
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.selection import Images, draw, load, make_parser, untrained_cache
from cafo.cache import accuracy
from cafo.errors import CafoError
from cafo.key_training import KeyTraining
from cafo.prediction_sets import in_set, score_threshold
from cafo.selection import Choosing, Select, select

COVERAGES = (0.8, 0.9, 0.95)
BINS = 15


def main() -> None:
    parser = make_parser(__doc__, seeds=5, shots=(2, 4, 8, 16))
    parser.add_argument("data", type=Path)
    parser.add_argument("--select", choices=["crossfit", "leave_one_out", "val"], default="crossfit")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = load(given.data)
    titles = ["K", "accuracy", "plain", "ece", *(f"{100 * c:g}: coverage, lowest, size" for c in COVERAGES)]
    print(" | ".join(titles), flush=True)
    for shots in given.shots:
        rows = [measure(images, shots, seed, given.select) for seed in range(given.seeds)]
        cells = [str(shots)]
        cells += [f"{statistics.mean(row[name] for row in rows):.1f}" for name in ("accuracy", "plain", "ece")]
        for coverage in COVERAGES:
            known = [row["sets"][coverage] for row in rows if row["sets"][coverage]]
            covered, sizes = [100 * share for share, _ in known], [size for _, size in known]
            cells.append(
                f"{statistics.mean(covered):.1f}, {min(covered):.1f}, {statistics.mean(sizes):.2f}" if known else "–"
            )
        print(" | ".join(cells), flush=True)


def measure(images: Images, shots: int, seed: int, how: Select) -> dict:
    """Figures on test images at one K and seed."""
    few, val, test = draw(images, shots, seed)
    cache, views, train = untrained_cache(images, few)
    on_val = ({name: f[val] for name, f in images.plain.items()}, images.labels[val])
    training = KeyTraining(seed=seed, epochs=0) if how == "leave_one_out" else KeyTraining(seed=seed)
    choosing = Choosing(grid=images.grid, estimate=False)
    chosen = select(cache, views, how, training, choosing, train=train, val=on_val).cache
    logits, labels = chosen.logits({name: f[test] for name, f in images.plain.items()}), images.labels[test]
    assert chosen.calibration is not None
    probabilities = chosen.calibration.probabilities(logits)
    return {
        "accuracy": 100 * accuracy(logits, labels),
        "plain": 100 * calibration_error(logits.softmax(dim=-1), labels),
        "ece": 100 * calibration_error(probabilities, labels),
        "sets": {coverage: sets(probabilities, labels, chosen.calibration.scores, coverage) for coverage in COVERAGES},
    }


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Mean difference of confidence and accuracy over bins of equal width, weighted by their images."""
    confidence, predicted = probabilities.max(dim=-1)
    right = (predicted == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    parts = [bins == number for number in range(BINS)]
    return sum(float((confidence[part].mean() - right[part].mean()).abs() * part.float().mean())
               for part in parts if part.any())  # fmt: skip


def sets(probabilities: Tensor, labels: Tensor, scores: Tensor, coverage: float) -> tuple[float, float] | None:
    """Coverage and mean size of the prediction sets; None where the scores are too few."""
    try:
        members = in_set(probabilities, score_threshold(scores, coverage))
    except CafoError:
        return None
    return float(members[torch.arange(len(labels)), labels].float().mean()), float(members.sum(dim=1).float().mean())


if __name__ == "__main__":
    main()
