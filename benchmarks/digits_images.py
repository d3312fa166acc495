"""What images add on the demo's digits: 597 test scans, four lettered options, three bases with an adapter each.

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
from pathlib import Path
from typing import Any

from rayjobs.config import load
from rayjobs.demo.llama import LlamaStandIn, stand_in_llama
from rayjobs.demo.questions import write_questions
from rayjobs.demo.world import WorldConfig, make_world
from rayjobs.jobs import adapter_eval, adapter_train, adapter_tune
from rayjobs.report import show_table
from rayjobs.tables import read_json, write_json

LLAMA = {"reads": "questions", "vocab_size": 384, "steps": 1000, "answer_weight": 100, "init_std": 1.5}
ATTENTION = ["zero-init", "rand-init", "prefix"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/digits_images"))
    given = parser.parse_args()
    rows = [row for seed in given.seeds for row in measure(seed, given.out.absolute())]
    write_json(given.out / "table.json", rows)
    columns = [name for name in rows[0] if name not in ("seed", "adapter")]
    shown = []
    for name in dict.fromkeys(row["adapter"] for row in rows):
        mine = [row for row in rows if row["adapter"] == name]
        shown.append([name, *(_mean([row[column] for row in mine]) for column in columns)])
    show_table("digits, test", ["adapter", *columns], shown)


def measure(seed: int, out: Path) -> list[dict[str, Any]]:
    """All adapters on the base of one seed."""
    cache = out / "cache"
    world = make_world(WorldConfig(), cache)
    questions, shuffled = out / f"questions-{seed}", out / f"shuffled-{seed}"
    if not (questions / "template.json").exists():
        split = read_json(world.digits / "split.json")
        scans = {part: [(world.digits / path, digit) for path, digit, _ in split[part]] for part in split}
        write_questions(questions, scans, seed)
    if not shuffled.exists():
        _shuffle(questions, shuffled, seed)
    base = stand_in_llama(LlamaStandIn(**LLAMA, seed=seed), cache)
    tuned = load(adapter_tune.Config, _training(base, world.clip, questions, seed, out, f"sweep-{seed}"))
    adapter_tune.run(tuned)
    rows = []
    for trial in adapter_tune.check(tuned):
        settings = adapter_tune.training(tuned, trial)
        name = f"image-conditioned, {settings.adapter.attention}"
        rows.append(_row(name, seed, settings.run.folder, settings.vision, base, questions, shuffled, out))
    blind = _training(base, None, questions, seed, out, f"text-only-{seed}")
    trained = load(adapter_train.Config, {name: value for name, value in blind.items() if name != "sweep"})
    adapter_train.run(trained)
    rows.append(_row("text-only", seed, trained.run.folder, None, base, questions, shuffled, out))
    rows.append(_row("none", seed, None, None, base, questions, shuffled, out))
    return rows


def _training(base: Path, clip: Path | None, questions: Path, seed: int, out: Path, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "base": {"path": str(base)},
        "data": {
            "path": [str(questions / "train.jsonl")],
            "template": str(questions / "template.json"),
            "max_length": 96,
            "val_fraction": 0.0,
        },
        "adapter": {"n_layers": 3},
        "train": {"epochs": 3.4, "warmup_epochs": 0.024, "global_batch": 32, "seed": seed},  # 2 of 287 steps of warm-up
        "optimizer": {"base_lr": 0.072},
        "zero": {"stage": 0},
        "run": {"name": name, "storage": str(out), "cache": str(out / "cache")},
        "sweep": {"axes": {"adapter.attention": ATTENTION}, "seeds": [seed]},
    }
    if clip is not None:
        settings["vision"] = {"tower": {"kind": "clip", "weights": str(clip)}, "bottleneck": 128}
    return settings


def _row(
    name: str, seed: int, run: Path | None, vision: Any, base: Path, questions: Path, shuffled: Path, out: Path
) -> dict[str, Any]:
    trial = read_json(run / "trial.json") if run and (run / "trial.json").exists() else {}
    by_class = {
        told: _asked(f"{told}-{name.replace(', ', '-')}-{seed}", folder, run, vision, base, questions, out)
        for told, folder in (("asked", questions), *([("shuffled", shuffled)] if vision else []))
    }
    return {
        "adapter": name,
        "seed": seed,
        "image questions, %": by_class["asked"]["IMG"],
        "with images shuffled, %": by_class.get("shuffled", {}).get("IMG"),
        "note questions, %": by_class["asked"]["TXT"],
        **{f"{which} loss": trial.get(f"{which}_loss") for which in ("first", "peak", "final")},
    }


def _asked(
    name: str, folder: Path, run: Path | None, vision: Any, base: Path, questions: Path, out: Path
) -> dict[str, float]:
    """Accuracy on the test split by class."""
    settings = {
        "base": {"path": str(base)},
        "adapter": str(run / "adapter.safetensors") if run else None,
        "vision": vision,
        "task": "scienceqa",
        "data": {"path": [str(folder)], "template": str(questions / "template.json"), "max_length": 200},
        "batch_size": 128,
        "run": {"name": name.replace(" ", "-"), "storage": str(out / "evals")},
    }
    result = adapter_eval.run(load(adapter_eval.Config, settings))
    ours = result["accuracy_by_class"][1]
    return {group: float(ours[group]) for group in ("IMG", "TXT")}


def _shuffle(questions: Path, shuffled: Path, seed: int) -> None:
    """The same questions, their test images dealt anew."""
    shutil.copytree(questions, shuffled)
    images = sorted((questions / "images" / "test").glob("*/image.png"))
    dealt = random.Random(seed).sample(images, len(images))
    for image, other in zip(images, dealt, strict=True):
        shutil.copyfile(other, shuffled / image.relative_to(questions))


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread}"


if __name__ == "__main__":
    main()
