"""Both methods on a world small enough for two cores, offline: real scans, and tiny models trained while you watch.

A tiny CLIP, DINO and two tiny LLaMAs stand in for real ones. What follows is a chain of the ordinary jobs, cafo,
adapter-train and adapter-eval, and of the ordinary library. What is there already is taken from the cache: a second
run is short.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
from pydantic import Field

from adapter.model import AdaptedModel
from adapter.scienceqa import LETTERS, Problem, read_problems
from rayjobs.cluster.device import default_device
from rayjobs.config import config, load, to_dict
from rayjobs.console import show_table
from rayjobs.demo import notes
from rayjobs.demo.adapter_settings import AdaptersConfig, asking, reading, spelling, write_records, write_scan_questions
from rayjobs.demo.cache_dir import digest, link, threads
from rayjobs.demo.cafo_settings import BASELINES, CASCADE, CascadeConfig, cascade
from rayjobs.demo.gpus import gpus
from rayjobs.demo.stages import Stage, Stages
from rayjobs.demo.world import World, WorldConfig, make_world, world_in
from rayjobs.errors import UserError
from rayjobs.inference.scienceqa import prediction_examples
from rayjobs.jobs import adapter_eval, adapter_train, cafo
from rayjobs.lifecycle import job
from rayjobs.reporting import plots
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.reporting.figures import copy_figure, read_figures, save_plot
from rayjobs.runs.record import REPORT_FILE
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import read_jsonl, write_json
from rayjobs.storage.paths import LocalPath
from rayjobs.storage.yaml_file import write_yaml

Table = list[dict[str, Any]]

ADAPTERS = ("no adapter", "text-only", "image-conditioned")
HEADLINE = list(CASCADE)[-1]
PLOTS = ("shots", "landscape", "confusion", "classes", "sources")
"""Of CaFo's, those that the demo's own report shows, in this order; all but the first of `HEADLINE` alone."""

ABOUT = (
    "Real scans, scikit-learn's handwritten digits, and tiny models as stand-ins for real ones, trained here from "
    "scratch: a CLIP on printed digits with captions, a DINO on scans without labels, two LLaMAs on generated text. "
    "From then on they are frozen, and the jobs know them as they would know real ones. CaFo chose everything on "
    "{val} validation scans; only then were the {test} test scans opened, once. LLaMA-Adapter's settings are fixed; "
    "those of the instruction were set with held-out notes in view. The figures show how the parts compare on a tiny "
    "task, not what they reach with real models."
)
"""How the report opens."""


@config
class DemoRun(RunConfig):
    """Where the demo lives."""

    name: str = "demo"
    """The run's name; its folder is `storage/name`."""
    storage: LocalPath = "runs"
    """The folder of all runs."""
    cache: LocalPath | None = None
    """Where prepared data is kept and shared between runs; by default `storage/cache`."""


@config
class Config:
    JOB: ClassVar = "demo"

    world: WorldConfig = WorldConfig()
    cafo: CascadeConfig = CascadeConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    run: DemoRun = Field(default_factory=DemoRun)  # its folder starts where the demo is run, not where it is imported


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    check()
    world, adapters = settings.world, settings.adapters
    stages: list[list[str]] = [
        ["scans", f"{world.digits.train} to train on, {world.digits.val} to choose on, {world.digits.test} to test on"],
        ["tiny CLIP", f"{world.clip.steps} steps on printed digits with captions; it never sees a scan"],
        ["tiny DINO", f"{world.dino.steps} steps on the training scans without labels"],
        ["tiny LLaMAs", f"{world.notes.steps} steps on notes and {world.questions.steps} on questions, then frozen"],
        ["cafo", f"{len(settings.cafo.shots)} numbers of shots × {len(settings.cafo.seeds)} seeds, chosen on val"],
        ["adapter-train", f"a new instruction, {adapters.records} records, {adapters.workers} workers under ZeRO-2"],
        ["adapter-train", "questions about scans, without images and with them"],
        ["adapter-eval", "all test questions: no adapter, text-only, image-conditioned"],
        ["run folder", str(settings.run.folder)],
    ]
    show_table("plan", ["", ""], stages)


def check() -> None:
    """Raises ValueError if what draws the digits is not installed."""
    if lacking := [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"the demo needs {' and '.join(lacking)}; install the `demo` extra")


@job
def run(settings: Config) -> dict[str, Any]:
    """Runs the chain and prints what came of it; returns and writes `result.json`."""
    check()
    folder, cache = open_run(settings.run, settings), settings.run.cache_folder
    world = world_in(cache, settings.world)
    names = inner_runs(settings, world)
    stages = Stages(to_make(world, names, folder), cache)
    with threads(1):
        with stages.next():
            make_world(world, settings.world)
        for name, path in world._asdict().items():
            link(folder / "world" / name, path)
        with stages.next():
            accuracy = cafo_table(settings, world, names)
        with stages.next():
            spelled, spelled_loss, spelled_examples = teach(settings, world, names)
        with stages.next():
            asked, asked_loss, asked_examples = show(settings, world, names)
    losses = {"a new instruction": spelled_loss, "questions about scans": asked_loss}
    for _, figure in list(plots.training_curves(losses))[:1]:
        figure.axes[0].set_yscale("log")  # one begins twenty times as high as the other
        save_plot(folder / "loss.png", "training loss of the two adapters", figure)
    tables: dict[str, Table] = {
        "CaFo without pre-training: accuracy on test scans, %": [row for row in accuracy if row["method"] in BASELINES],
        "CaFo: accuracy on test scans, %": [row for row in accuracy if row["method"] not in BASELINES],
        "LLaMA-Adapter: exact answers on held-out notes, %": spelled,
        "LLaMA-Adapter: right answers of four options, %": asked,
        "training loss": [{"adapter": name, **sparkline(rows)} for name, rows in losses.items()],
        "answers": spelled_examples,
        "answers about scans": asked_examples,
        "seconds": stages.seconds(),
    }
    for title, rows in tables.items():
        show_table(title, list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    cascaded, pictured = accuracy[-1], asked[-1]
    result = {
        "headline": f"CaFo {list(cascaded.values())[-1]}% on scans; LLaMA-Adapter {pictured['about a scan']}% on "
        "questions about them",
        "about": ABOUT.format(val=settings.world.digits.val, test=settings.world.digits.test),
        **tables,
        "reports of the steps": [
            {"step": name, "report": f"{run}/{REPORT_FILE}"}
            for name, run in names.items()
            if (folder / run / REPORT_FILE).exists()
        ],
    }
    write_json(folder / "result.json", result)
    print(f"To show: {folder / REPORT_FILE}")
    return result


def quietly(job: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    """An ordinary job whose own tables are left to its own report."""
    with redirect_stdout(io.StringIO()):
        return job(settings)


def inner_runs(settings: Config, world: World) -> dict[str, str]:
    """The folders of the runs within: each by its content, so that other settings, or a newer version, find a folder of
    their own."""
    digits, clip, dino, drawn, notes, questions = (path.name for path in world)
    made = digest(digits, clip, dino, drawn, to_dict(settings.cafo))
    taught = digest(notes, to_dict(settings.adapters))
    asked = digest(digits, clip, questions, to_dict(settings.adapters))
    runs = {"cafo": f"cafo-{made}", "instruction": f"instruction-{taught}", "questions": f"questions-{asked}"}
    for name in ADAPTERS:
        runs |= {name: f"{name.replace(' ', '-')}-{asked}", f"{name}, test": f"{name.replace(' ', '-')}-{asked}-test"}
    return runs


def to_make(world: World, names: Mapping[str, str], folder: Path) -> list[Stage]:
    """The stages."""
    tested = [folder / names[f"{name}, test"] / "result.json" for name in ADAPTERS]
    return [
        Stage(
            "Tiny models are trained from scratch: a CLIP, a DINO and two LLaMAs that stand in for real ones.",
            50,
            world,
        ),
        Stage(
            "CaFo: CLIP chooses drawn pictures; encode once; train and search caches; choose on val; open test.",
            28,
            [folder / names["cafo"] / "test" / "result.json"],
        ),
        Stage(
            "LLaMA-Adapter: one LLaMA, frozen, is taught an instruction that it does not know.",
            26,
            [folder / names["instruction"] / "result.json"],
        ),
        Stage(
            "LLaMA-Adapter: the other, frozen, is asked about scans: without images, and with CLIP's features of them.",
            52,
            tested,
        ),
    ]


def within(settings: Config, name: str) -> dict[str, Any]:
    """The `run` section of a job inside the demo's folder."""
    return {"name": name, "storage": str(settings.run.folder), "cache": str(settings.run.cache_folder)}


def cafo_table(settings: Config, world: World, names: Mapping[str, str]) -> Table:
    """CaFo's jobs in the demo's world: test accuracies, a row for each method."""
    folder, run = settings.run.folder, RunConfig(**within(settings, names["cafo"]))
    values = cascade(settings.cafo, world, run, gpus())
    path = folder / f"{run.name}.yaml"  # an ordinary config, from which the job can be run again
    write_yaml(path, values)
    rows = quietly(cafo.run, load(cafo.Config, path))["eval"]["tables"]["digits"]
    for kind in PLOTS:
        for figure in read_figures(run.folder / "test"):
            if figure.file.startswith(kind) and (kind == "shots" or figure.group.startswith(f"{HEADLINE}, ")):
                copy_figure(run.folder / "test", replace(figure, folded=False), folder)
    return [{"method": method, **row} for method, row in rows.items()]


def teach(settings: Config, world: World, names: Mapping[str, str]) -> tuple[Table, Table, Table]:
    """adapter-train on the new instruction: exact answers before and after, the training's metrics, examples."""
    adapters, folder = settings.adapters, settings.run.folder
    write_records(adapters, folder)
    values = spelling(adapters, world.notes, folder, within(settings, names["instruction"]), gpus())
    trained = quietly(adapter_train.run, load(adapter_train.Config, values))
    base = AdaptedModel.from_pretrained(world.notes, device=default_device())
    asked = {
        task.name: notes.records(task, adapters.held_out, adapters.seed, test=True)
        for task in (notes.SPELL, notes.COPY)
    }
    answers: dict[str, list[list[str]]] = {name: [] for name in asked}
    for file in (None, trained["adapter"]):
        if file is not None:
            base.load_adapter(file)
        for name, records in asked.items():
            prompts = [notes.TEMPLATE.render(record["instruction"], record["input"]) for record in records]
            said = base.generate(prompts, max_new_tokens=16, temperature=0)
            answers[name].append([answer.strip() for answer in said])
    accuracy, shown = [], []
    for name, records in asked.items():
        wanted = [record["output"] for record in records]
        right = [sum(map(str.__eq__, said, wanted)) for said in answers[name]]
        before, after = (f"{100 * count / len(records):.1f}" for count in right)
        accuracy.append({"instruction": name, "frozen base": before, "with adapter": after})
        for record, first, second in list(zip(records, *answers[name], strict=True))[:2]:
            question = {"instruction": record["instruction"], "note": record["input"]}
            shown.append({**question, "frozen base": first, "with adapter": second})
    return accuracy, read_jsonl(Path(trained["adapter"]).with_name("metrics.jsonl")), shown


def show(settings: Config, world: World, names: Mapping[str, str]) -> tuple[Table, Table, Table]:
    """adapter-train and adapter-eval on questions about scans: right answers, the training's metrics, examples."""
    adapters, folder = settings.adapters, settings.run.folder
    questions = folder / names["questions"]
    write_scan_questions(world, questions, adapters.seed)
    problems = read_problems(questions, "test")
    accuracy, said, metrics = [], {}, Path()
    for name in ADAPTERS:
        run = within(settings, names[name])
        values = reading(adapters, world.questions, world.clip if name == ADAPTERS[-1] else None, questions, run)
        adapter = None
        if name != ADAPTERS[0]:
            trained = quietly(adapter_train.run, load(adapter_train.Config, values))
            adapter = Path(trained["adapter"])
            metrics = adapter.with_name("metrics.jsonl")
        run = within(settings, names[f"{name}, test"])
        measured = load(adapter_eval.Config, asking(values, adapter, questions, run))
        ours = quietly(adapter_eval.run, measured)["accuracy_by_class"][1]
        accuracy.append({"": name, "about a scan": ours["IMG"], "about a note": ours["TXT"]})
        said[name] = pq.read_table(measured.run.folder / "predictions.parquet").to_pylist()
    write_examples(folder, *prediction_examples(problems, said[ADAPTERS[-1]], questions))
    return accuracy, read_jsonl(metrics), _side_by_side(problems, said)


def _side_by_side(problems: Sequence[Problem], said: Mapping[str, Table]) -> Table:
    """Three questions about scans, and what each adapter says."""
    shown = []
    for i in [i for i, problem in enumerate(problems) if problem.image][:3]:
        problem = problems[i]
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
        truth = f"{problem.choices[problem.answer]} ({LETTERS[problem.answer]})"
        answers = {name: rows[i]["text"].strip().removeprefix("The answer is ") for name, rows in said.items()}
        shown.append({"options": options, "it shows": truth, **answers})
    return shown


def sparkline(rows: Table, width: int = 24) -> dict[str, str]:
    """A loss curve as one line of text, on a logarithmic scale, between its first and last values."""
    import numpy as np

    losses = np.array([row["loss"] for row in rows if "loss" in row])
    heights = [float(np.log(max(part.mean(), 1e-9))) for part in np.array_split(losses, min(width, len(losses)))]
    low, high = min(heights), max(heights)
    bars = "▁▂▃▄▅▆▇█"
    drawn = "".join(bars[round((height - low) / max(high - low, 1e-9) * (len(bars) - 1))] for height in heights)
    return {"first": f"{losses[0]:.3f}", "log of the loss over steps": drawn, "last": f"{losses[-1]:.3f}"}
