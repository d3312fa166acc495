"""Measure a base, with or without an adapter, on held-out records, with a pool of workers.

task=loss: cross-entropy and perplexity of the records' outputs. task=answers: generated answers beside the records'
own, by exact match, ROUGE-L and chrF, with every answer in answers.parquet. task=scienceqa: accuracy in the paper's
eight classes. The same command resumes an interrupted run and keeps the answers that are there. Records that cannot be
used are set aside one by one.

Records that the adapter was trained on are refused unless `allow_training_records` is set; the result then says how
many they are. They are known by content, from the run that the adapter lies in.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from adapter.adapter_file import AdapterFile
from adapter.records.scienceqa import PROBLEMS, Problem, read_problems
from adapter.templates import Template, template_fields
from rayjobs.cluster.ray_init import connect
from rayjobs.config import to_dict
from rayjobs.console import show_result, show_table
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.record_files import Role
from rayjobs.data.records import DataConfig, RecordsConfig, Source, check_sources
from rayjobs.data.rejected import check_rejected_share, write_rejected
from rayjobs.data.templates import describe_sources, source_templates
from rayjobs.data.token_store import IMAGE_LISTS, Split, prepare_tokens
from rayjobs.data.trained_records import held_out_of, held_out_records, is_held_out
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.answer_metrics import AnswerScorer
from rayjobs.inference.batch import IDENTITY, BatchGenerator, Record
from rayjobs.inference.instructions import ANSWERS, AnswerInstructions
from rayjobs.inference.loss import LOSSES, record_losses, summarize_losses
from rayjobs.inference.record_answers import (
    ANSWERED,
    ANSWERS_FILE,
    Question,
    answered_rows,
    read_questions,
    rejected_questions,
    summarize_answers,
    usable,
)
from rayjobs.inference.result_identity import data_identity, model_identity
from rayjobs.inference.scienceqa import (
    MAX_ANSWER_TOKENS,
    PREDICTIONS,
    AnswerProblems,
    prediction_examples,
    problem_record,
    rejected_problems,
    summarize,
    text_examples,
)
from rayjobs.inference.training_records import Overlap, find_overlap
from rayjobs.job_configs.adapter_eval import Config
from rayjobs.lifecycle import job
from rayjobs.models.base_model import open_tokenizer
from rayjobs.models.image_conditioning import ImageConditioning
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import REJECTED_FILE, open_run
from rayjobs.storage.files import write_parquet
from rayjobs.storage.paths import resolve_path

logger = logging.getLogger(__name__)


class Checked(NamedTuple):
    """Inputs that `check` has opened."""

    tokenizer: Path
    """path or URL of the tokenizer"""
    records: RecordsConfig
    sources: list[Source]
    templates: list[Template]
    """the template of each source"""
    problems: list[Problem]
    """the problems of task=scienceqa; none for other tasks"""
    conditioning: ImageConditioning | None
    """the image encoder; None if images are left out"""
    saved: AdapterFile | None
    """the adapter; None for the base alone"""
    window: int
    """tokens of the base's window"""
    overlap: Overlap
    """the records among those to be scored that the adapter was trained on"""


def check(settings: Config, *, weights: bool = True) -> Checked:
    """Check everything that can be checked before a worker starts. Raises a UserError for the first problem.

    weights: False to leave the weights of a base on the hub there.
    """
    checkpoint, tokenizer, conditioning, saved = settings.open(weights=weights)
    records = settings.records
    length, window = records.max_length, checkpoint.config.max_seq_len
    sources, problems = records.all_sources(), list[Problem]()
    if settings.task == "scienceqa":
        if settings.reading == "generate" and min(length, window) <= MAX_ANSWER_TOKENS:
            raise ConfigError(
                f"data.max_length={length} with a window of {window} leaves no prompt: an answer has up to "
                f"{MAX_ANSWER_TOKENS} tokens"
            )
        sources = [scienceqa_source(settings, records)]
        problems = read_test_problems(sources[0])
        if settings.split and sources[0].role == "train":
            problems = [each for each in problems if is_held_out(each.record(), records.held_out_fraction)]
    elif settings.task == "loss" and length > window:
        raise ConfigError(f"data.max_length is {length}, more than the window of {settings.base.path}, {window} tokens")
    else:
        check_sources(sources)
    templates = source_templates(sources, open_tokenizer(tokenizer), saved)
    if settings.task == "answers":
        AnswerScorer()  # refuses where its packages are not installed
    overlap = check_overlap(settings, records, problems)
    return Checked(tokenizer, records, sources, templates, problems, conditioning, saved, window, overlap)


def scienceqa_source(settings: Config, records: RecordsConfig) -> Source:
    """The folder of ScienceQA to measure: its test split, or with `split` what the adapter's run validates on.

    Raises ConfigError if there are several.
    """
    given = records.path
    if settings.split and isinstance(records, DataConfig) and records.val_path:
        given = records.val_path
    if len(given) != 1:
        raise ConfigError(f"task scienceqa measures one folder at a time, data.path names {len(given)}")
    role: Role = "test" if not settings.split else "train" if given is records.path else "val"
    return replace(records, format="scienceqa").source(given[0], role)


def check_overlap(settings: Config, records: RecordsConfig, problems: Sequence[Problem]) -> Overlap:
    """Compare the records to be scored with those that the adapter was trained on.

    Raises:
        DataError: the adapter was trained on some, and `allow_training_records` is not set; or none is to be scored.
    """
    if settings.adapter is None:
        return Overlap(0, 0, "")
    if settings.task == "scienceqa":
        scored: Iterable[dict[str, Any]] = (problem.record() for problem in problems)
    elif settings.split:
        scored = held_out_records(records)
    else:
        scored = (record for source in records.all_sources() for record in source.read())
    overlap = find_overlap(settings.adapter, scored)
    if settings.split and not overlap.records:
        raise DataError(f"{settings.adapter}: its run held out no records; name others in data.path")
    if overlap.trained_on and not settings.allow_training_records:
        others = "" if settings.split else "name other records; or give split=val for what its run held out; or "
        raise DataError(
            f"{settings.adapter} was trained on {overlap.trained_on:,} of the {overlap.records:,} records, such as "
            f"{overlap.example!r}: {others}allow_training_records=true to score them too, which the result then says"
        )
    return overlap


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
    held_out = [["scored", f"what the run of the adapter held out, {checked.overlap.records:,} records"]]
    rows = [
        ["base", settings.base.path],
        ["adapter", settings.adapter or "none"],
        ["task", settings.task],
        ["data", describe_sources(checked.sources, checked.templates)],
        *(held_out if settings.split else []),
        ["trained on", describe_overlap(settings, checked.overlap)],
        ["images", f"read by {encoder.identity}" if encoder else "left out"],
        ["workers", str(settings.scale.workers)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Measure; return and write `result.json`, with every record's loss or prediction beside it as Parquet."""
    checked = check(settings)
    overlap = checked.overlap
    measure = {"loss": measure_loss, "answers": measure_answers, "scienceqa": measure_scienceqa}[settings.task]
    result = measure(settings, checked)
    result["headline"] += overlap.label
    result["records_trained_on"] = "unknown" if overlap.trained_on is None else overlap.trained_on
    if overlap.trained_on != 0:
        result["warning"] = describe_overlap(settings, overlap)
        logger.warning("%s", result["warning"])
    write_result(settings.run.folder, result)
    show_result(settings.run.name, result)
    return result


def describe_overlap(settings: Config, overlap: Overlap) -> str:
    """Say how many of the records the adapter was trained on, and what that means for the figures."""
    if settings.adapter is None:
        return "none: the base alone is measured"
    if overlap.trained_on is None:
        return (
            "which records the adapter was trained on is not known, as no run is beside it: the figures may be of "
            "records that it knows"
        )
    if not overlap.trained_on:
        return "none of the records"
    return (
        f"the adapter was trained on {overlap.trained_on:,} of the {overlap.records:,} records: the figures say how "
        "well it knows these, not how well it does on others"
    )


def measure_loss(settings: Config, checked: Checked) -> dict[str, Any]:
    """Compute the loss of every record; write `losses.parquet`."""
    tokenizer, conditioning = checked.tokenizer, checked.conditioning
    folder, cache = open_run(settings.run, settings), settings.run.cache_folder
    connect(folder, cache)
    settings.scale.resources()  # workers that can never run are refused before anything is tokenized
    preprocess = conditioning and conditioning.encoder.preprocess
    store = prepare_tokens(checked.records, tokenizer, cache, saved=checked.saved, preprocess=preprocess, run=folder)
    images = None
    if settings.vision and conditioning:
        lists = resolve_path(store.folder) / IMAGE_LISTS
        images = prepare_image_source(settings.vision, conditioning, checked.sources, lists, cache, settings.scale, 0)
    split: Split = settings.split or "train"
    losses = record_losses(settings, conditioning, store, images, settings.token_budget, settings.scale, split)
    write_parquet(folder / "losses.parquet", losses, LOSSES)
    left_out = {"rejected_records": store.rejected, "images_left_out": store.images_left_out}
    return {**summarize_losses(losses), **left_out}


def measure_answers(settings: Config, checked: Checked) -> dict[str, Any]:
    """Answer every record in its own template; write `answers.parquet`."""
    conditioning, pieces, scorer = checked.conditioning, open_tokenizer(checked.tokenizer), AnswerScorer()
    model, asked = model_identity(settings, conditioning), list[tuple[list[Question], BatchGenerator]]()
    for source, template in zip(checked.sources, checked.templates, strict=True):
        records = held_out_of(source, checked.records.held_out_fraction) if settings.split else source.read()
        questions = list(read_questions(records, template, pieces, checked.window))
        identity = {
            **model,
            **data_identity(usable(questions), source.images, reads_images=conditioning is not None),
            "template": template_fields(template),
            "decoding": to_dict(settings.decoding),
            "batch_size": settings.batch_size,
        }
        generator = BatchGenerator(
            task=AnswerInstructions(template, settings.decoding),
            schema=ANSWERS,
            parts=settings.run.folder / "parts" / str(len(asked)),
            identity=identity,
            chunk_size=settings.batch_size,
            model=settings,
            conditioning=conditioning,
            image_root=source.images,
            pool=settings.scale,
        )
        check_provenance(generator.parts / IDENTITY, identity)  # before anything of a finished run is overwritten
        asked.append((questions, generator))
    folder, rows, rejected = open_run(settings.run, settings), list[Record](), list[dict[str, str]]()
    for questions, generator in asked:
        to_answer = usable(questions)
        answers = generator.run(to_answer).to_pylist() if to_answer else []
        answered = answered_rows(questions, answers, scorer)
        rows, rejected = rows + answered, rejected + rejected_questions(answered, questions)
    write_parquet(folder / ANSWERS_FILE, pa.Table.from_pylist(rows, ANSWERED))
    write_rejected(folder, rejected)
    reasons = [f"{row['record']}: {row['reason']}" for row in rejected]
    share, listed = checked.records.max_rejected_fraction, str(folder / REJECTED_FILE)
    check_rejected_share(reasons, len(rows), share, "data.max_rejected_fraction", listed=listed)
    return summarize_answers(rows, scorer)


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
        task=AnswerProblems(template, settings.reading, checked.records.max_length),
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
    write_rejected(folder, rejected)
    check_rejected_share(
        [f"problem {row['pid']}: {row['reason']}" for row in rejected],
        len(problems),
        checked.records.max_rejected_fraction,
        "data.max_rejected_fraction",
        listed=str(folder / REJECTED_FILE),
    )
    rows = predictions.to_pylist()
    write_examples(folder, *prediction_examples(problems, rows, resolve_path(source.images)))
    result = summarize(settings.run.name, problems, predictions, folder)
    if examples := text_examples(problems, rows):
        result["problems without an image, mistakes first"] = examples
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
        "max_length": checked.records.max_length,
        "batch_size": settings.batch_size,
    }


def _show_by_class(title: str, accuracy_by_class: list[dict[str, str]]) -> None:
    """Print the table with a class per row, because a terminal is narrow."""
    columns = zip(*(row.values() for row in accuracy_by_class), strict=True)
    header, *lines = [[name, *cells] for name, cells in zip(accuracy_by_class[0], columns, strict=True)]
    show_table(title, header, lines)
