"""Measure a base, with or without an adapter, on held-out records, with a pool of workers.

task=loss: cross-entropy and perplexity of the records' outputs. task=scienceqa: accuracy in the paper's eight classes;
the same command resumes an interrupted run and keeps the predictions that are there. Records that cannot be used are
set aside one by one.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from adapter.adapter_file import AdapterFile
from adapter.records.scienceqa import PROBLEMS, Problem, read_problems
from adapter.templates import Template, template_fields
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.console import show_result, show_table
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.records import RecordsConfig, Source, check_sources
from rayjobs.data.rejected import check_rejected_share
from rayjobs.data.templates import describe_sources, source_templates
from rayjobs.data.token_store import IMAGE_LISTS, prepare_tokens
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.batch import IDENTITY, BatchGenerator
from rayjobs.inference.loss import LOSSES, record_losses, summarize_losses
from rayjobs.inference.result_identity import data_identity, model_identity
from rayjobs.inference.scienceqa import (
    MAX_ANSWER_TOKENS,
    PREDICTIONS,
    AnswerProblems,
    Reading,
    prediction_examples,
    problem_record,
    rejected_problems,
    summarize,
)
from rayjobs.inference.training_records import describe_overlap
from rayjobs.lifecycle import job
from rayjobs.models.base_model import open_tokenizer
from rayjobs.models.image_conditioning import ImageConditioning
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import REJECTED_FILE, RunConfig, open_run
from rayjobs.storage.files import write_jsonl, write_parquet
from rayjobs.storage.paths import resolve_path

logger = logging.getLogger(__name__)


@config
class Config(AdapterSourceConfig):
    """Settings of adapter-eval."""

    JOB: ClassVar = "adapter-eval"

    task: Literal["loss", "scienceqa"] = "loss"
    """Measure: held-out `loss`, or accuracy on `scienceqa`, which reads one ScienceQA folder, its test split unless
    data.path names another."""
    reading: Reading = "generate"
    """Prediction of scienceqa: `generate` a text and read the answer out of it, or take the option with the highest
    `likelihood`."""
    batch_size: int = Field(default=16, ge=1)
    """Problems of scienceqa per batch of a worker."""
    data: RecordsConfig
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per batch of a worker for task=loss, padding included."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig


class Checked(NamedTuple):
    """Inputs that `check` has opened."""

    tokenizer: Path
    """path or URL of the tokenizer"""
    sources: list[Source]
    templates: list[Template]
    """the template of each source"""
    problems: list[Problem]
    """the problems of scienceqa; none for task=loss"""
    conditioning: ImageConditioning | None
    """the image encoder; None if images are left out"""
    saved: AdapterFile | None
    """the adapter; None for the base alone"""


def check(settings: Config, *, weights: bool = True) -> Checked:
    """Check everything that can be checked before a worker starts. Raises a UserError for the first problem.

    weights: False to leave the weights of a base on the hub there.
    """
    checkpoint, tokenizer, conditioning, saved = settings.open(weights=weights)
    length, window = settings.data.max_length, checkpoint.config.max_seq_len
    sources, problems = settings.data.sources(), list[Problem]()
    if settings.task == "scienceqa":
        if len(sources) != 1:
            raise ConfigError(f"task scienceqa measures one folder at a time, data.path names {len(sources)}")
        if settings.reading == "generate" and min(length, window) <= MAX_ANSWER_TOKENS:
            raise ConfigError(
                f"data.max_length={length} with a window of {window} leaves no prompt: an answer has up to "
                f"{MAX_ANSWER_TOKENS} tokens"
            )
        sources = [replace(settings.data, format="scienceqa").source(settings.data.path[0], "test")]
        problems = read_test_problems(sources[0])
    elif length > window:
        raise ConfigError(f"data.max_length is {length}, more than the window of {settings.base.path}, {window} tokens")
    else:
        check_sources(sources)
    templates = source_templates(sources, open_tokenizer(tokenizer), saved)
    return Checked(tokenizer, sources, templates, problems, conditioning, saved)


def read_test_problems(source: Source) -> list[Problem]:
    """The problems of ScienceQA's split that a source names. Raises an error if there is none, or a malformed one."""
    problems = read_problems(resolve_path(source.path), source.split)
    if not problems:
        raise DataError(f"{source.path}: no problems in the split {source.split!r}")
    return problems


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    checked = check(settings, weights=False)
    encoder = checked.conditioning and checked.conditioning.encoder
    rows = [
        ["base", settings.base.path],
        ["adapter", settings.adapter or "none"],
        ["task", settings.task],
        ["data", describe_sources(checked.sources, checked.templates)],
        ["images", f"read by {encoder.identity}" if encoder else "left out"],
        ["workers", str(settings.scale.workers)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Measure; return and write `result.json`, with every record's loss or prediction beside it as Parquet."""
    checked = check(settings)
    overlap = describe_overlap(settings.adapter, checked.sources)
    if overlap:
        logger.warning("%s", overlap)
    result = measure_scienceqa(settings, checked) if settings.task == "scienceqa" else measure_loss(settings, checked)
    if overlap:
        result["headline"] += ", on records that the adapter was trained on"
        result["warning"] = overlap
    write_result(settings.run.folder, result)
    show_result(settings.run.name, result)
    return result


def measure_loss(settings: Config, checked: Checked) -> dict[str, Any]:
    """Compute the loss of every record; write `losses.parquet`."""
    tokenizer, conditioning = checked.tokenizer, checked.conditioning
    folder, cache = open_run(settings.run, settings), settings.run.cache_folder
    connect(folder, cache)
    settings.scale.resources()  # workers that can never run are refused before anything is tokenized
    preprocess = conditioning and conditioning.encoder.preprocess
    store = prepare_tokens(settings.data, tokenizer, cache, saved=checked.saved, preprocess=preprocess, run=folder)
    images = None
    if settings.vision and conditioning:
        lists = resolve_path(store.folder) / IMAGE_LISTS
        images = prepare_image_source(settings.vision, conditioning, checked.sources, lists, cache, settings.scale, 0)
    losses = record_losses(settings, conditioning, store, images, settings.token_budget, settings.scale)
    write_parquet(folder / "losses.parquet", losses, LOSSES)
    left_out = {"rejected_records": store.rejected, "images_left_out": store.images_left_out}
    return {**summarize_losses(losses), **left_out}


def measure_scienceqa(settings: Config, checked: Checked) -> dict[str, Any]:
    """Predict the answer of every problem; write `predictions.parquet`, tables and examples."""
    (source,), (template,), conditioning = checked.sources, checked.templates, checked.conditioning
    problems, reads_images = checked.problems, conditioning is not None
    task = task_identity(settings, checked, reads_images=reads_images)
    identity = {**model_identity(settings, conditioning), **task}
    parts = settings.run.folder / "parts"
    check_provenance(parts / IDENTITY, identity)  # before anything of a finished run is overwritten
    folder = open_run(settings.run, settings)
    predictions = BatchGenerator(
        task=AnswerProblems(template, settings.reading, settings.data.max_length),
        schema=PREDICTIONS,
        parts=parts,
        identity=identity,
        chunk_size=settings.batch_size,
        model=settings,
        conditioning=conditioning,
        image_root=source.images,
        pool=settings.scale,
    ).run(map(problem_record, problems))
    write_parquet(folder / "predictions.parquet", predictions, PREDICTIONS)
    rejected = rejected_problems(predictions, str(resolve_path(source.path) / PROBLEMS))
    write_jsonl(folder / REJECTED_FILE, rejected)
    check_rejected_share(
        [f"problem {row['pid']}: {row['reason']}" for row in rejected],
        len(problems),
        settings.data.max_rejected_fraction,
        "data.max_rejected_fraction",
        listed=str(folder / REJECTED_FILE),
    )
    write_examples(folder, *prediction_examples(problems, predictions.to_pylist(), resolve_path(source.images)))
    result = summarize(settings.run.name, problems, predictions, folder)
    result["images_left_out"] = 0 if reads_images else result["with_image"]
    _show_by_class(source.path, result["accuracy_by_class"])
    return result


def task_identity(settings: Config, checked: Checked, *, reads_images: bool) -> dict[str, Any]:
    """Identify, by content, everything besides the model that scienceqa's predictions depend on."""
    records = [problem_record(problem) for problem in checked.problems]
    return {
        **data_identity(records, checked.sources[0].images, reads_images),
        "template": template_fields(checked.templates[0]),
        "reading": settings.reading,
        "max_length": settings.data.max_length,
        "batch_size": settings.batch_size,
    }


def _show_by_class(title: str, accuracy_by_class: list[dict[str, str]]) -> None:
    """Print the table with a class per row, because a terminal is narrow."""
    columns = zip(*(row.values() for row in accuracy_by_class), strict=True)
    header, *lines = [[name, *cells] for name, cells in zip(accuracy_by_class[0], columns, strict=True)]
    show_table(title, header, lines)
