"""Settings of the demo's LLaMA-Adapter jobs: a new instruction, questions about images, and a real LLaMA's new form."""

from pathlib import Path
from typing import Any

from rayjobs.demo import notes
from rayjobs.demo.config import AdaptersConfig, PretrainedConfig
from rayjobs.demo.questions import write_questions
from rayjobs.demo.world import World, worker_count
from rayjobs.storage.files import atomic_folder, read_json, write_json, write_jsonl


def write_records(settings: AdaptersConfig, folder: Path) -> None:
    """Write the training records, `records.jsonl`, and their prompt template, `template.json`."""
    spell = notes.records(notes.SPELL, settings.records, settings.seed, test=False)
    copy = notes.records(notes.COPY, settings.records // 2, settings.seed, test=False)
    write_jsonl(folder / "records.jsonl", spell + copy)
    template = {"with_input": notes.TEMPLATE.with_input, "without_input": notes.TEMPLATE.without_input}
    write_json(folder / "template.json", template)


def instruction_train_settings(
    settings: AdaptersConfig, base: Path, records: Path, run: dict[str, Any], gpus: int
) -> dict[str, Any]:
    """Settings of adapter-train on the instruction that the base does not know."""
    return {
        "base": {"path": str(base)},
        "data": {
            "path": [str(records / "records.jsonl")],
            "template": str(records / "template.json"),
            "max_length": 96,
            "val_fraction": 0.05,
        },
        "adapter": {"n_layers": 3},
        "train": {
            "epochs": settings.epochs,
            "warmup_epochs": 0.5,
            "global_batch": 32,
            "seed": settings.seed,
            "validate_every_steps": 10**6,
        },
        "optimizer": {"base_lr": 0.4},
        "scale": {"workers": worker_count(gpus, settings.workers), "threads_per_worker": 1},
        "run": run,
    }


def write_scan_questions(world: World, folder: Path, seed: int) -> None:
    """Write questions about the scans with `write_questions`, unless the folder exists."""
    if folder.exists():
        return
    split = read_json(world.digits / "split.json")
    scans = {part: [(world.digits / path, digit) for path, digit, _ in split[part]] for part in split}
    with atomic_folder(folder) as new:
        write_questions(new, scans, seed)


def question_train_settings(
    settings: AdaptersConfig, base: Path, clip: Path | None, questions: Path, run: dict[str, Any]
) -> dict[str, Any]:
    """Settings of adapter-train on questions about images; without a CLIP, the adapter is text-only."""
    values: dict[str, Any] = {
        "base": {"path": str(base)},
        "data": {
            "path": [str(questions / "train.jsonl")],
            "template": str(questions / "template.json"),
            "max_length": 96,
            "val_fraction": 0.0,
        },
        "adapter": {"n_layers": 3},
        "train": {  # the warm-up is 2 of 287 steps
            "epochs": settings.question_epochs,
            "warmup_epochs": 0.024,
            "global_batch": 32,
            "seed": settings.seed,
        },
        "optimizer": {"base_lr": 0.072},
        "scale": {"workers": 1, "threads_per_worker": 1},  # a second worker would take longer to start than to train
        "run": run,
    }
    if clip is not None:
        values["vision"] = {"encoder": {"kind": "clip", "weights": str(clip)}, "bottleneck": 128}
    return values


def question_eval_settings(
    trained: dict[str, Any], adapter: Path | None, questions: Path, run: dict[str, Any]
) -> dict[str, Any]:
    """Settings of adapter-eval on the test questions; without an adapter, of the base alone.

    trained: the result of `question_train_settings`.
    """
    return {
        "base": trained["base"],
        "adapter": str(adapter) if adapter else None,
        "vision": trained.get("vision") if adapter else None,
        "task": "scienceqa",
        "data": {"path": [str(questions)], "template": trained["data"]["template"], "max_length": 200},
        "batch_size": 128,
        "run": run,
    }


def json_train_settings(
    settings: PretrainedConfig, base: Path, records: Path, run: dict[str, Any], gpus: int
) -> dict[str, Any]:
    """Settings of adapter-train on answers in JSON, for a base of SmolLM2-135M's size, in its own chat template."""
    return {
        "base": {"path": str(base), "dtype": "bf16"},
        "data": {"path": [str(records)], "template": "chat", "max_length": 128, "val_fraction": 0.0},
        "adapter": {"n_layers": 28, "prompt_length": 10},
        "train": {"epochs": 1, "warmup_epochs": 0.1, "global_batch": 8, "seed": settings.seed},
        "optimizer": {"base_lr": 0.64, "clip_norm": 1.0},
        "zero": {"stage": 0},
        "scale": {"workers": 1, "gpus_per_worker": min(gpus, 1), "threads_per_worker": 2},
        "run": run,
    }
