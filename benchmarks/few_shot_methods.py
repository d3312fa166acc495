"""Compare CaFo's cache with its rivals on the same features, the same shots and the same choice of hyperparameters.

    python -m benchmarks.few_shot_methods FEATURES... [--seeds 5] [--shots 1 2 4 8 16] [--methods GDA …] [--json FILE]
    python -m benchmarks.few_shot_methods --json FILE              # the tables of figures that the file has already

FEATURES are what `benchmarks.selection` reads: a file of features, or the demo's folder. Figures that FILE has are not
measured again. For every seed, K images of each class are drawn, and each method is fitted on them; all see the same
images. Its hyperparameters are chosen

val       on 100 validation images
crossfit  on the K shots alone, in five folds
none      on nothing: the method's defaults; for CaFo the α and β of its prior

by the rule that CaFo uses, and the classifier is scored on test images. Where several encoders' features are given, all
methods read CLIP's. ProLIP is left out, as the files have no features before CLIP's projection. RLA is trained as its
authors mean it without validation images, with λ = 1/K, and only where that takes seconds. The text classifier is
TIMO's one sentence of each class, so that nothing of it is left but text among the samples. Grids of β and γ are
coarser than the authors' (50 and 5 values); β ends where CaFo's grid does, and α far beyond the authors' ends, as those
were often chosen.

Prints, in Markdown, accuracies in percent, mean ± standard deviation over seeds, then differences from CaFo's cache,
paired by seed, each with its 95% interval (Student's t). The last column of the accuracies is the seconds of one fit
with its choice at the largest K.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.selection import Images, draw, load, make_parser, untrained_cache
from cafo.cache import accuracy
from cafo.key_training import KeyTraining
from cafo.methods import METHODS
from cafo.methods.ape import Ape
from cafo.methods.ape_t import ApeT
from cafo.methods.base import Features, FewShotImages, Method
from cafo.methods.choice import Chosen, Judged, choose, held_out_fits
from cafo.methods.gda import Gda
from cafo.methods.tip_adapter import TipAdapter, TipAdapterF
from cafo.methods.voting import VotingGrid
from cafo.selection import Choosing, select
from rayjobs.reporting.paired_differences import student_t975

CAFO, ZERO_SHOT = "CaFo's cache", "zero-shot"
WAYS = ("val", "crossfit", "none")
SIZE_OF_RLA = 2e8
"""M · C² up to which RLA is trained"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The accuracy of one method at one K and seed."""

    data: str
    shots: int
    seed: int
    method: str
    select: str
    accuracy: float
    seconds: float


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("data", type=Path, nargs="*")
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "ProLIP"])
    parser.add_argument("--json", type=Path, default=Path("runs/few_shot_methods.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [Row(**row) for row in json.loads(given.json.read_text())] if given.json.exists() else []
    for path in given.data:
        images = load(path)
        for seed in range(given.seeds):
            for shots in given.shots:
                known = {row.method for row in rows if (row.data, row.shots, row.seed) == (path.stem, shots, seed)}
                wanted = [name for name in (CAFO, *given.methods) if name not in known]
                rows += measure(images, path.stem, shots, seed, wanted)
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps([vars(row) for row in rows]))
    for line in tables(rows):
        print(line)


def measure(images: Images, data: str, shots: int, seed: int, names: Sequence[str]) -> Iterator[Row]:
    """Yield the test accuracies of some methods at one K and seed."""
    few, val, test = draw(images, shots, seed)

    def row(method: str, how: str, logits: Tensor, began: float) -> Row:
        seconds = time.perf_counter() - began
        score = accuracy(logits, images.labels[test])
        return Row(data=data, shots=shots, seed=seed, method=method, select=how, accuracy=score, seconds=seconds)

    plain = images.plain["clip"]
    train = FewShotImages(
        views=Features(embeddings=images.views["clip"][:, few]),
        plain=Features(embeddings=plain[few]),
        labels=images.labels[few],
        classifier=images.classifier,
        prompts=images.classifier.T[:, None],
    )
    val_features, test_features = Features(embeddings=plain[val]), Features(embeddings=plain[test])
    if CAFO in names:
        yield from _measure_cafo(images, few, val, test, seed, row)
        for how in WAYS:
            yield row(ZERO_SHOT, how, train.zero_shot(test_features), time.perf_counter())
    for name in names:
        if name == CAFO:
            continue
        method = scaled(METHODS[name], images)
        rla = name in ("RLA", "ProLIP")
        if method.lacks(train.given) or (rla and len(few) * len(images.classifier) ** 2 > SIZE_OF_RLA):
            continue
        began = time.perf_counter()
        fitted = method.fit(train, seed)
        fit_seconds = time.perf_counter() - began
        for how in ("none",) if rla else WAYS:
            began = time.perf_counter() - fit_seconds
            judged: list[Judged] = []
            if how == "val":
                judged = [Judged(fitted, val_features, images.labels[val])]
            elif how == "crossfit" and not (judged := held_out_fits(method, train, 5, seed)):
                continue
            chosen = Chosen(fitted=fitted, setting=choose(method, judged), how=how)
            yield row(name, how, chosen.logits(test_features), began)


def _measure_cafo(
    images: Images, few: Tensor, val: Tensor, test: Tensor, seed: int, row: Callable[[str, str, Tensor, float], Row]
) -> Iterator[Row]:
    """Yield CaFo's cache with CLIP alone, and with all encoders if there are more."""
    for sources in dict.fromkeys((("clip",), tuple(images.plain))):
        some = replace(
            images,
            plain={name: images.plain[name] for name in sources},
            views={name: images.views[name] for name in sources},
        )
        name = CAFO if sources == ("clip",) else f"{CAFO}, {' + '.join(sources)}"
        cache, views, train = untrained_cache(some, few)
        on_val = ({source: f[val] for source, f in some.plain.items()}, images.labels[val])
        test_features = {source: f[test] for source, f in some.plain.items()}
        for how in ("val", "crossfit", "prior"):
            if how == "crossfit" and len(few) == images.classifier.shape[1]:
                continue
            began = time.perf_counter()
            choosing = Choosing(grid=images.grid, estimate=False)
            chosen = select(cache, views, how, KeyTraining(seed=seed), choosing, train=train, val=on_val)
            yield row(name, "none" if how == "prior" else how, chosen.cache.logits(test_features), began)


def scaled(method: Method, images: Images) -> Method:
    """Return a method with grids that suit the size of the data set's zero-shot logits, and with CaFo's α₀."""
    grid = VotingGrid(beta_high=images.grid.high, alpha_high=20.0 * images.alpha, beta_steps=50, alpha_steps=80)
    match method:
        case TipAdapter():
            return replace(method, grid=grid)
        case Ape():
            return replace(method, grid=grid, gamma_steps=5)
        case TipAdapterF() | ApeT():
            return replace(method, grid=grid, alpha=images.alpha)
        case Gda():
            return replace(method, alpha_powers=(-4, 4))
    return method


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the tables of each data set."""
    for data in dict.fromkeys(row.data for row in rows):
        some = [row for row in rows if row.data == data]
        seeds = len({row.seed for row in some})
        yield f"\n### {data}, {seeds} seeds\n"
        for how in WAYS:
            yield from _table(f"Accuracy, `{how}`", [row for row in some if row.select == how], _mean_and_deviation)
        for how in WAYS:
            reference = {
                (row.shots, row.seed): row.accuracy for row in some if row.select == how and row.method == CAFO
            }
            differences = [
                replace(row, accuracy=row.accuracy - reference[row.shots, row.seed])
                for row in some
                if row.select == how and row.method != CAFO and (row.shots, row.seed) in reference
            ]
            yield from _table(f"Difference from {CAFO}, `{how}`", differences, _mean_and_interval)


def _table(title: str, rows: Sequence[Row], cell: Callable[[Sequence[float]], str]) -> Iterator[str]:
    shots = sorted({row.shots for row in rows})
    yield f"\n{title}\n"
    timed = cell is _mean_and_deviation
    yield f"| method | {' | '.join(f'K = {k}' for k in shots)} |{' s |' if timed else ''}"
    yield "|---" * (len(shots) + 1 + timed) + "|"
    for method in sorted({row.method for row in rows}, key=_order):
        mine = [row for row in rows if row.method == method]
        cells = [cell([row.accuracy for row in mine if row.shots == k]) for k in shots]
        seconds = statistics.median(row.seconds for row in mine if row.shots == max(r.shots for r in mine))
        yield f"| {method} | {' | '.join(cells)} |{f' {seconds:.1f} |' if timed else ''}"


def _order(method: str) -> tuple[int, str]:
    """CaFo first, then the methods in the order of their registry."""
    return (1 + list(METHODS).index(method) if method in METHODS else -(method != ZERO_SHOT), method)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.1f}" if values else "–"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def _mean_and_interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}" if values else "–"
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = student_t975(len(values) - 1) * error
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


if __name__ == "__main__":
    main()
