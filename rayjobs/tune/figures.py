"""Figures and example images of a sweep and of its evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cafo.datasets import Dataset
from cafo.search import surface
from rayjobs.data.feature_store import Features
from rayjobs.data.image_list import ImageList
from rayjobs.reporting import plots
from rayjobs.reporting.example_gallery import ORDER, mistakes_first, write_examples
from rayjobs.reporting.figures import save_plot
from rayjobs.storage.files import read_json, write_json
from rayjobs.tune.search_space import SearchConfig
from rayjobs.tune.selection import best_on_val, shown
from rayjobs.tune.trial import SharedInputs, open_cache


def plot_search_surfaces(folder: Path, chosen: list[dict[str, Any]], shared: SharedInputs, how: SearchConfig) -> None:
    """`surface.json`, val accuracy over α and β, in the folder of the first trial of each choice that is plotted."""
    labels = torch.tensor(shared.val_labels)
    for cell in shown(chosen):
        trial = cell["seeds"][0]["trial"]
        path = folder / "trials" / trial / "surface.json"
        if path.exists():
            continue
        cache = open_cache(folder / "trials", trial)
        alphas = np.linspace(0, 2.5 * max(cache.alpha, 0.4), 61).tolist()
        betas = np.linspace(how.beta_low, how.beta_high, 30).tolist()
        features = {name: torch.tensor(shared.val[name]) for name in {*cache.keys, cache.zero_shot_source}}
        correct = surface(cache, features, labels, alphas=alphas, betas=betas)
        write_json(path, {"alphas": alphas, "betas": betas, "correct": correct.tolist(), "total": len(labels)})


def keep_examples(folder: Path, trials: Path, chosen: list[dict[str, Any]], images: ImageList, found: Features) -> None:
    """Small copies of some test images, with what the cell that did best on val says of them; mistakes first."""
    best = best_on_val(chosen)
    cache = open_cache(trials, best["seeds"][0]["trial"])
    shares = cache.logits({name: torch.tensor(found.values[name][0]) for name in cache.encoders}).softmax(dim=1)
    items = [images.items[row] for row in found.rows]
    wrong = [i for i, item in enumerate(items) if int(shares[i].argmax()) != item.label]
    right = sorted(set(range(len(items))) - set(wrong))
    shown = []
    for i in mistakes_first(wrong, right):
        said = int(shares[i].argmax())
        truth = "" if said == items[i].label else f", not {items[i].class_name}"
        caption = f"{cache.class_names[said]}{truth} ({shares[i, said]:.0%})"
        shown.append((images.root / items[i].path, caption))
    write_examples(folder, shown, f"{best['method']} at {best['shots']} shots, first seed; {ORDER}")


def draw(
    folder: Path, trials: Path, chosen: list[dict[str, Any]], rows: list[dict[str, Any]], dataset: Dataset
) -> None:
    """Of the best choice, 00, and of each other method's at its most shots, first seed: val accuracy over α and β; on
    test each class's accuracy, the confusion, and which source wins."""
    for number, cell in enumerate(shown(chosen)):
        seed = cell["seeds"][0]
        title = f"{cell['method']}, {cell['shots']} shots, seed {seed['seed']}"
        found = read_json(trials / seed["trial"] / "surface.json")
        accuracy = [[100 * count / found["total"] for count in line] for line in found["correct"]]
        figure = plots.search_landscape(found["alphas"], found["betas"], accuracy, (seed["alpha"], seed["beta"]))
        save_plot(folder / f"landscape-{number:02d}.png", f"{title}: accuracy on val over α and β", figure)
        (row,) = (
            r for r in rows if (r["method"], r["shots"], r["seed"]) == (cell["method"], cell["shots"], seed["seed"])
        )
        images = row["confusion"].sum(axis=1)
        accuracy = (100 * row["confusion"].diagonal() / images.clip(min=1)).tolist()
        figure = plots.class_accuracy(dataset.class_names, accuracy)
        save_plot(folder / f"classes-{number:02d}.png", f"{title}: accuracy of each class on test", figure)
        figure = plots.confusion(dataset.class_names, row["confusion"].tolist())
        save_plot(folder / f"confusion-{number:02d}.png", f"{title}: confusion on test", figure)
        if len(row["wins"]) > 1:
            shares = {
                source: [100 * count / max(total, 1) for count, total in zip(counts, images, strict=True)]
                for source, counts in row["wins"].items()
            }
            figure = plots.winning_sources(dataset.class_names, shares)
            save_plot(folder / f"sources-{number:02d}.png", f"{title}: which source weighs most on test", figure)
