"""LLaMA-Adapter on a world small enough for two cores, offline: a tiny LLaMA is trained, frozen, and adapted.

The tiny LLaMA stands in for a real one; what follows is the ordinary job `adapter-train` and the ordinary library.
What is trained already is taken from the cache, so a second run is short.
"""

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from adapter.base import Base
from rayjobs.config import config, load
from rayjobs.demo import text
from rayjobs.demo.llama import LlamaStandIn, stand_in_llama
from rayjobs.jobs import adapter_train
from rayjobs.report import show_table
from rayjobs.runs import recorded
from rayjobs.runtime import RunConfig, open_run
from rayjobs.tables import write_json, write_jsonl


@config
class DemoRun(RunConfig):
    """Where the demo lives."""

    name: str = "demo"
    """The run's name; its folder is `storage/name`."""


@config
class Config:
    llama: LlamaStandIn = LlamaStandIn()
    train_records: int = Field(default=900, ge=10)
    """Records of the new instruction to train on, and half as many of the old one."""
    test_records: int = Field(default=200, ge=1)
    """Held-out records of each instruction."""
    epochs: float = Field(default=16, gt=0)
    """Passes of the adapter over its records."""
    workers: int = Field(default=2, ge=1)
    """Ray Train workers, under ZeRO-2."""
    run: DemoRun = DemoRun()


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    stages: list[list[str]] = [
        ["tiny LLaMA", f"{settings.llama.steps} steps on notes in digits and words, then frozen"],
        ["adapter-train", f"{settings.train_records} records, {settings.workers} workers under ZeRO-2"],
        ["measure", f"{settings.test_records} held-out records of each instruction, before and after"],
        ["run folder", str(settings.run.folder)],
    ]
    show_table("plan", ["", ""], stages)


@recorded
def run(settings: Config) -> dict[str, Any]:
    """Runs the chain and prints what came of it; returns and writes `result.json`."""
    folder, began = open_run(settings.run, settings), time.monotonic()
    print("1. A tiny LLaMA is trained from scratch; it stands in for a real one.", flush=True)
    base = stand_in_llama(settings.llama, settings.run.cache_folder)
    pretrained = time.monotonic()
    print("2. It is frozen; adapter-train teaches it an instruction that it does not know.", flush=True)
    trained = adapter_train.run(_adapter_train(settings, base, folder))
    adapted = time.monotonic()
    print("3. Both answer held-out records.", flush=True)
    accuracy, examples = _measure(settings, base, trained["adapter"])
    done = time.monotonic()
    show_table("exact answers on held-out notes", ["instruction", "frozen base", "with adapter"], _percent(accuracy))
    show_table("examples", ["instruction", "note", "frozen base", "with adapter"], examples)
    seconds = {"tiny LLaMA": pretrained - began, "adapter-train": adapted - pretrained, "measure": done - adapted}
    show_table("seconds", ["", ""], [[stage, f"{took:.0f}"] for stage, took in seconds.items()])
    result = {"accuracy": accuracy, "base": str(base), "adapter": trained["adapter"]}
    write_json(folder / "result.json", result)
    print(f"The adapter: {trained['adapter']}, {trained['trainable_parameters']:,} parameters. All of it: {folder}")
    return result


def _adapter_train(settings: Config, base: Path, folder: Path) -> adapter_train.Config:
    """The settings of the ordinary job."""
    spell = text.records(text.SPELL, settings.train_records, settings.llama.seed, test=False)
    copy = text.records(text.COPY, settings.train_records // 2, settings.llama.seed, test=False)
    write_jsonl(folder / "records.jsonl", spell + copy)
    template = {"with_input": text.TEMPLATE.with_input, "without_input": text.TEMPLATE.without_input}
    write_json(folder / "template.json", template)
    return load(
        adapter_train.Config,
        None,
        [
            f"base.path={json.dumps(str(base))}",
            f"data.path={json.dumps([str(folder / 'records.jsonl')])}",
            f"data.template={json.dumps(str(folder / 'template.json'))}",
            "data.max_length=96",
            "data.val_fraction=0.05",
            "adapter.n_layers=3",
            "optimizer.base_lr=0.4",
            f"train.epochs={settings.epochs}",
            "train.warmup_epochs=0.5",
            "train.global_batch=32",
            f"train.seed={settings.llama.seed}",
            f"train.validate_every_steps={10**6}",
            f"scale.workers={settings.workers}",
            f"run.storage={json.dumps(str(folder))}",
            f"run.cache={json.dumps(str(settings.run.cache_folder))}",
            "run.name=adapter",
        ],
    )


def _measure(settings: Config, path: Path, adapter: str) -> tuple[dict[str, list[float]], list[list[str]]]:
    """Exact answers by greedy decoding, {task: [base, adapted]}, and three examples of each task side by side."""
    base = Base.load(path)
    asked = {
        task.name: text.records(task, settings.test_records, settings.llama.seed, test=True)
        for task in (text.SPELL, text.COPY)
    }
    answers: dict[str, list[list[str]]] = {name: [] for name in asked}
    for file in (None, adapter):
        if file is not None:
            base.load_adapter(file)
        for name, records in asked.items():
            prompts = [text.TEMPLATE.render(record["instruction"], record["input"]) for record in records]
            said = base.generate(prompts, max_new_tokens=16, temperature=0)
            answers[name].append([answer.strip() for answer in said])
    accuracy = {
        name: [
            sum(answer == record["output"] for answer, record in zip(said, records, strict=True)) / len(records)
            for said in answers[name]
        ]
        for name, records in asked.items()
    }
    examples = [
        [record["instruction"], record["input"], before, after]
        for name, records in asked.items()
        for record, before, after in list(zip(records, answers[name][0], answers[name][1], strict=True))[:3]
    ]
    return accuracy, examples


def _percent(accuracy: dict[str, list[float]]) -> list[list[str]]:
    return [[task, *(f"{share:.1%}" for share in shares)] for task, shares in accuracy.items()]
