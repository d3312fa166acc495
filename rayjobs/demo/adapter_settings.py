"""The settings of LLaMA-Adapter's ordinary jobs in the demo's world: an instruction taught by text alone, and questions
that only an image answers."""

from pathlib import Path
from typing import Any

from pydantic import Field

from rayjobs.config import config
from rayjobs.demo import notes
from rayjobs.demo.gpus import workers
from rayjobs.demo.questions import write_questions
from rayjobs.demo.world import World
from rayjobs.storage.files import atomic_folder, read_json, write_json, write_jsonl


@config
class AdaptersConfig:
    """How much the adapters are taught."""

    records: int = Field(default=900, ge=10)
    """Records of the new instruction to train on, and half as many of the old one."""
    held_out: int = Field(default=200, ge=1)
    """Records of each instruction to measure with; they hold notes that are in nothing else."""
    epochs: float = Field(default=16, gt=0)
    """Passes over the records."""
    question_epochs: float = Field(default=3.4, gt=0)
    """Passes over the questions about images."""
    workers: int = Field(default=2, ge=1)
    """Ray Train workers that learn the instruction, under ZeRO-2; where there are GPUs, at most one on each."""
    seed: int = Field(default=0, ge=0)
    """Of records, questions, prompts and their order."""


def write_records(settings: AdaptersConfig, folder: Path) -> None:
    """`records.jsonl`, and the `template.json` they are read by."""
    spell = notes.records(notes.SPELL, settings.records, settings.seed, test=False)
    copy = notes.records(notes.COPY, settings.records // 2, settings.seed, test=False)
    write_jsonl(folder / "records.jsonl", spell + copy)
    template = {"with_input": notes.TEMPLATE.with_input, "without_input": notes.TEMPLATE.without_input}
    write_json(folder / "template.json", template)


def spelling(settings: AdaptersConfig, base: Path, records: Path, run: dict[str, Any], gpus: int) -> dict[str, Any]:
    """Of adapter-train, on the instruction that the base does not know."""
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
        "scale": {"workers": workers(gpus, settings.workers), "threads_per_worker": 1},
        "run": run,
    }


def write_scan_questions(world: World, folder: Path, seed: int) -> None:
    """Questions about the world's scans as `questions.write_questions` writes them, unless they are there."""
    if folder.exists():
        return
    split = read_json(world.digits / "split.json")
    scans = {part: [(world.digits / path, digit) for path, digit, _ in split[part]] for part in split}
    with atomic_folder(folder) as new:
        write_questions(new, scans, seed)


def reading(
    settings: AdaptersConfig, base: Path, clip: Path | None, questions: Path, run: dict[str, Any]
) -> dict[str, Any]:
    """Of adapter-train, on questions about images; without a CLIP, the adapter is text-only and cannot see them."""
    values: dict[str, Any] = {
        "base": {"path": str(base)},
        "data": {
            "path": [str(questions / "train.jsonl")],
            "template": str(questions / "template.json"),
            "max_length": 96,
            "val_fraction": 0.0,
        },
        "adapter": {"n_layers": 3},
        "train": {  # 2 of 287 steps of warm-up
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


def asking(trained: dict[str, Any], adapter: Path | None, questions: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Of adapter-eval, on the test questions; `trained` is what `reading` gave. Without an adapter, of the base."""
    return {
        "base": trained["base"],
        "adapter": str(adapter) if adapter else None,
        "vision": trained.get("vision") if adapter else None,
        "task": "scienceqa",
        "data": {"path": [str(questions)], "template": trained["data"]["template"], "max_length": 200},
        "batch_size": 128,
        "run": run,
    }
