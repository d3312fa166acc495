"""Measure the share of a sweep's time that is not spent in its trials.

    python benchmarks/cafo_sweep.py [--trials 64] [--epochs 2] [--at-once 2] [--json]

Random unit features at Caltech101's size (100 classes, 16 shots and one generated image of each, ten views, CLIP 1024
and DINO 2048 wide, 1,649 validation images) are shared by `run_sweep` as `cafo-tune` shares them: a grid of learning
rates, each trial training its keys and searching α and β. Few epochs make the trials short, and the share of everything
else large.

overhead  1 - (seconds of all trials) / (trials at once × seconds), from the first trial's start to the last one's
          end. A trial's seconds run from its first line to its last.
startup_s from the call to the first trial's start: starting Ray's workers, their imports, copying the features to the
          object store.

With `--json` the last line is `{"trials": …, "overhead": …, …}`. The overhead should stay below 0.20.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from rayjobs.cluster.ray_init import connect
from rayjobs.tune.search_space import SearchConfig, SpaceConfig, enumerate_settings, enumerate_trials
from rayjobs.tune.sweep import TrialPool, run_sweep
from rayjobs.tune.trial import SharedInputs

CLASSES, KEYS_PER_CLASS, VIEWS, IMAGES = 100, 17, 10, 1649
WIDTHS = {"clip": 1024, "dino": 2048}


def make(seed: int) -> SharedInputs:
    """Noisy copies of one random direction per class, as unit features."""
    rng = np.random.default_rng(seed)
    labels, val_labels = np.arange(CLASSES).repeat(KEYS_PER_CLASS), rng.integers(CLASSES, size=IMAGES)
    views, val, classifiers = {}, {}, {}
    for name, width in WIDTHS.items():
        centres = rng.normal(size=(CLASSES, width))

        def unit(rows: np.ndarray, noise: float, shape: tuple[int, ...], width: int = width) -> np.ndarray:
            noisy = rows + noise * rng.normal(size=(*shape, width))
            return (noisy / np.linalg.norm(noisy, axis=-1, keepdims=True)).astype(np.float32)

        views[name] = unit(centres[labels], 7.0, (VIEWS, len(labels)))
        val[name] = unit(centres[val_labels], 7.0, (IMAGES,))
        classifiers[name, "templates"] = np.ascontiguousarray(unit(centres, 18.0, (CLASSES,)).T)
    return SharedInputs(
        views=views,
        labels=labels,
        few_shot={(16, 0): np.arange(len(labels))},
        generated={0: np.arange(0)},
        val=val,
        val_labels=val_labels,
        classifiers=classifiers,
        class_names=tuple(f"class {i}" for i in range(CLASSES)),
        identities=dict.fromkeys(WIDTHS, "random"),
    )


def measure(trials: int, epochs: int, at_once: int) -> dict[str, float | int]:
    shared = make(seed=0)
    space = SpaceConfig(shots=[16], seeds=[0], lr=np.geomspace(1e-4, 1e-2, trials).tolist(), epochs=[epochs])
    how = SearchConfig()
    settings = enumerate_settings(space, how, list(WIDTHS), VIEWS, file=False)
    assert len(enumerate_trials(space, settings)) == trials
    connect()
    with tempfile.TemporaryDirectory() as folder:
        called, driver = time.time(), time.process_time()
        over = run_sweep(
            space, settings, shared, how, Path(folder) / "trials", TrialPool(at_once, {"CPU": 1.0 / at_once})
        )
        driver = time.process_time() - driver
        ends = [(Path(folder) / "trials" / trial.name / "result.json").stat().st_mtime for trial, _ in over]
    own = [result.seconds or 0.0 for _, result in over]
    start = min(end - seconds for end, seconds in zip(ends, own, strict=True))
    wall = max(ends) - start
    return {
        "trials": trials,
        "at_once": at_once,
        "epochs": epochs,
        "overhead": round(1 - sum(own) / (at_once * wall), 4),
        "wall_s": round(wall, 1),
        "trial_s": round(sum(own) / trials, 2),
        "startup_s": round(start - called, 1),
        "driver_cpu_s": round(driver, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON line and nothing else")
    options = parser.parse_args()
    result = measure(options.trials, options.epochs, options.at_once)
    if options.json:
        print(json.dumps(result), flush=True)
        return
    print(f"{result['trials']} trials of {result['trial_s']} s, {result['at_once']} at once, in {result['wall_s']} s")
    print(f"not in the trials: {result['overhead']:.1%}; before the first of them {result['startup_s']} s")


if __name__ == "__main__":
    main()
