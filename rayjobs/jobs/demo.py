"""Both methods on a world small enough for two cores, offline: real scans, and tiny models trained while you watch.

A tiny CLIP, DINO and LLaMA stand in for real ones. What follows is a chain of the ordinary jobs, cafo and
adapter-train, and of the ordinary library. What is there already is taken from the cache: a second run is short.
"""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from adapter.base import Base
from rayjobs.config import config, load, to_dict
from rayjobs.demo import text
from rayjobs.demo.cascade import BASELINES, CascadeConfig, cascade
from rayjobs.demo.kept import digest, link
from rayjobs.demo.llama import LlamaStandIn, stand_in_llama
from rayjobs.demo.world import WorldConfig, make_world
from rayjobs.jobs import adapter_train, cafo
from rayjobs.report import show_table
from rayjobs.runs import recorded
from rayjobs.runtime import RunConfig, open_run
from rayjobs.tables import write_json, write_jsonl, write_text


@config
class DemoRun(RunConfig):
    """Where the demo lives."""

    name: str = "demo"
    """The run's name; its folder is `storage/name`."""


@config
class Config:
    world: WorldConfig = WorldConfig()
    cafo: CascadeConfig = CascadeConfig()
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
    check()
    world = settings.world
    stages: list[list[str]] = [
        ["scans", f"{world.digits.train} to train on, {world.digits.val} to choose on, {world.digits.test} to test on"],
        ["tiny CLIP", f"{world.clip.steps} steps on printed digits with captions; it never sees a scan"],
        ["tiny DINO", f"{world.dino.steps} steps on the training scans without labels"],
        ["cafo", f"{len(settings.cafo.shots)} numbers of shots × {len(settings.cafo.seeds)} seeds, chosen on val"],
        ["tiny LLaMA", f"{settings.llama.steps} steps on notes in digits and words, then frozen"],
        ["adapter-train", f"{settings.train_records} records, {settings.workers} workers under ZeRO-2"],
        ["measure", f"{settings.test_records} held-out records of each instruction, before and after"],
        ["run folder", str(settings.run.folder)],
    ]
    show_table("plan", ["", ""], stages)


def check() -> None:
    """Raises ValueError if what draws the digits is not installed."""
    if lacking := [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the demo needs {' and '.join(lacking)}; install the `demo` extra")


STAGES = {
    "A tiny CLIP and a tiny DINO are trained from scratch; they stand in for real ones.": 50,
    "cafo: CLIP chooses drawn pictures; encode once; train and search caches; choose on val; open test.": 45,
    "A tiny LLaMA is trained from scratch; it stands in for a real one.": 8,
    "It is frozen; adapter-train teaches it an instruction that it does not know.": 55,
    "Both answer held-out records.": 4,
}
"""What happens, and the seconds that it takes on two idle cores when nothing is cached."""


class Stages:
    """Announces what comes next, and about how long is left."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def begin(self) -> None:
        self.began.append(time.monotonic())
        number, expected = len(self.began), list(STAGES.values())
        took, planned = self.began[-1] - self.began[0], sum(expected[: number - 1])
        left = sum(expected[number - 1 :]) * (took / planned if planned else 1.0)
        print(f"{number}/{len(STAGES)}  {list(STAGES)[number - 1]}  (about {left:.0f} s left in all)", flush=True)

    def seconds(self) -> list[list[str]]:
        ends = [*self.began[1:], time.monotonic()]
        return [[stage, f"{end - start:.0f}"] for stage, start, end in zip(STAGES, self.began, ends, strict=False)]


@recorded
def run(settings: Config) -> dict[str, Any]:
    """Runs the chain and prints what came of it; returns and writes `result.json`."""
    check()
    folder, stages = open_run(settings.run, settings), Stages()
    tables = cafo_table(settings, folder, stages)
    stages.begin()
    base = stand_in_llama(settings.llama, settings.run.cache_folder)
    stages.begin()
    trained = adapter_train.run(_adapter_train(settings, base, folder))
    stages.begin()
    accuracy, examples = _measure(settings, base, trained["adapter"])
    columns = list(next(iter(tables.values())))
    for title, names in (
        ("CaFo, without pre-training", BASELINES),
        ("CaFo", [n for n in tables if n not in BASELINES]),
    ):
        show_table(f"{title}: accuracy on test scans, %", ["", *columns], [[n, *tables[n].values()] for n in names])
    show_table("exact answers on held-out notes", ["instruction", "frozen base", "with adapter"], _percent(accuracy))
    show_table("examples", ["instruction", "note", "frozen base", "with adapter"], examples)
    show_table("seconds", ["", ""], stages.seconds())
    result = {"cafo": tables, "accuracy": accuracy, "base": str(base), "adapter": trained["adapter"]}
    write_json(folder / "result.json", result)
    print(f"The adapter: {trained['adapter']}, {trained['trainable_parameters']:,} parameters. All of it: {folder}")
    return result


def cafo_table(settings: Config, folder: Path, stages: Stages) -> dict[str, dict[str, str]]:
    """CaFo's jobs in the demo's world; the table of test accuracies, {method: {shots: accuracy}}."""
    stages.begin()
    cache = settings.run.cache_folder
    world = make_world(settings.world, cache)
    for name, path in world._asdict().items():
        link(folder / "world" / name, path)
    stages.begin()
    # by its content, so that other settings, or a newer version, find a folder of their own
    name = f"cafo-{digest(*map(str, world), to_dict(settings.cafo))}"
    values = cascade(settings.cafo, world, RunConfig(name=name, storage=str(folder), cache=str(cache)))
    path = folder / f"{name}.yaml"  # an ordinary config, from which the job can be run again
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return cafo.run(load(cafo.Config, path))["eval"]["tables"]["digits"]


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
