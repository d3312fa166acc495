"""Measure what images add on the demo's digits: 597 test scans, four lettered options, three bases and seeds.

    python -m benchmarks.digits_images [--seeds 0 1 2] [--out runs/digits_images]

For every seed a tiny LLaMA is trained, which never sees an image, and then adapted with adapter-tune: image-conditioned
adapters with zero-init attention, with its gate fixed at 1, and with an ordinary prefix, on the same 2,700 questions
about 900 scans. adapter-eval answers the test questions: with images, with the images shuffled among the questions, and
questions about notes, the skill that must stay. A text-only adapter and the bare base are asked the same. Settings were
chosen on validation scans with seed 0. Prints mean ± standard deviation over seeds; `table.json` has all figures.
"""

import argparse
import random
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayjobs.config import load
from rayjobs.console import show_table
from rayjobs.demo.adapter_settings import (
    AdaptersConfig,
    question_eval_settings,
    question_train_settings,
    write_scan_questions,
)
from rayjobs.demo.config import WorldConfig
from rayjobs.demo.world import make_world, world_paths
from rayjobs.jobs import adapter_eval, adapter_train, adapter_tune
from rayjobs.storage.files import atomic_folder, read_json, write_json

METHODS = ["zero_init", "rand_init", "prefix"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/digits_images"))
    given = parser.parse_args()
    rows = [row for seed in given.seeds for row in measure(seed, given.out.absolute())]
    write_json(given.out / "table.json", rows)
    columns = [name for name in rows[0] if name not in ("seed", "adapter")]
    table = []
    for name in dict.fromkeys(row["adapter"] for row in rows):
        group = [row for row in rows if row["adapter"] == name]
        table.append([name, *(_mean([row[column] for row in group]) for column in columns)])
    show_table("digits, test", ["adapter", *columns], table)


def measure(seed: int, out: Path) -> list[dict[str, Any]]:
    """Train and measure all adapters on the base of one seed. Returns a row of the table for each."""
    config = WorldConfig()
    config = replace(config, questions=replace(config.questions, seed=seed))
    world = world_paths(out / "cache", config)
    make_world(world, config)
    base = world.questions
    questions, shuffled = out / f"questions-{seed}", out / f"shuffled-{seed}"
    write_scan_questions(world, questions, seed)
    if not shuffled.exists():
        shuffle_images(questions, shuffled, seed)
    recipe = AdaptersConfig(workers=1, seed=seed)

    def run(name: str) -> dict[str, str]:
        return {"name": f"{name}-{seed}", "storage": str(out), "cache": str(out / "cache")}

    values = question_train_settings(recipe, base, world.clip, questions, run("sweep"))
    sweep = {"axes": {"adapter.method": METHODS}, "seeds": [seed]}
    tuned = load(adapter_tune.Config, {**values, "zero": {"stage": 0}, "sweep": sweep})
    adapter_tune.run(tuned)
    adapters: dict[str, Path | None] = {}
    for trial in adapter_tune.check(tuned):
        settings = adapter_tune.trial_settings(tuned, trial)
        adapters[f"image-conditioned, {settings.adapter.method}"] = settings.run.folder
    blind = load(adapter_train.Config, question_train_settings(recipe, base, None, questions, run("text-only")))
    adapter_train.run(blind)
    adapters |= {"text-only": blind.run.folder, "none": None}
    return [_row(name, seed, run_folder, values, questions, shuffled, out) for name, run_folder in adapters.items()]


def _row(
    name: str, seed: int, run: Path | None, values: dict[str, Any], questions: Path, shuffled: Path, out: Path
) -> dict[str, Any]:
    trial = read_json(run / "trial.json") if run and (run / "trial.json").exists() else {}
    given = {**values, "vision": values["vision"] if trial else None}
    by_class = {
        variant: _accuracy(f"{variant}-{name.replace(', ', '-')}-{seed}", folder, run, given, out)
        for variant, folder in (("asked", questions), *([("shuffled", shuffled)] if trial else []))
    }
    return {
        "adapter": name,
        "seed": seed,
        "image questions, %": by_class["asked"]["IMG"],
        "with images shuffled, %": by_class.get("shuffled", {}).get("IMG"),
        "note questions, %": by_class["asked"]["TXT"],
        **{f"{which} loss": trial.get(f"{which}_loss") for which in ("first", "peak", "final")},
    }


def _accuracy(name: str, folder: Path, run: Path | None, values: dict[str, Any], out: Path) -> dict[str, float]:
    """Accuracy on the test split by class."""
    evals = {"name": name.replace(" ", "-"), "storage": str(out / "evals")}
    settings = question_eval_settings(values, run / "adapter.safetensors" if run else None, folder, evals)
    accuracy = adapter_eval.run(load(adapter_eval.Config, settings))["accuracy_by_class"][1]
    return {group: float(accuracy[group].split()[0]) for group in ("IMG", "TXT")}


def shuffle_images(questions: Path, shuffled: Path, seed: int) -> None:
    """Write the same questions with their test images permuted among them."""
    images = sorted((questions / "images" / "test").glob("*/image.*"))
    permuted = random.Random(seed).sample(images, len(images))
    with atomic_folder(shuffled) as new:
        shutil.copytree(questions, new, dirs_exist_ok=True)
        for image, other in zip(images, permuted, strict=True):
            shutil.copyfile(other, new / image.relative_to(questions))


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3g}{spread}"


if __name__ == "__main__":
    main()
