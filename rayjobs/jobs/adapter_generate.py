"""Answer instructions with a base and its adapter: one from the command line, a file of them, or on the terminal.

A file is answered by a pool of workers in a run with its own folder and report. The same command resumes an interrupted
run and keeps the answers that are there. Records that cannot be answered are set aside one by one.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adapter.records.files import check_text
from adapter.templates import template_fields
from rayjobs.cluster.device import default_device
from rayjobs.cluster.remote_model import load_on_gpu
from rayjobs.config import to_dict
from rayjobs.console import show_table
from rayjobs.data.rejected import check_rejected_share, write_rejected
from rayjobs.data.templates import CHAT, saved_template
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.batch import IDENTITY, BatchGenerator, Record, read_pixels
from rayjobs.inference.instruction_file import (
    InstructionRow,
    describe_error,
    join_answers,
    read_instructions,
    rejected_rows,
    set_aside,
    shown_answer,
    write_answers,
)
from rayjobs.inference.instructions import ANSWERS, AnswerInstructions, evenly_spaced
from rayjobs.inference.overwriting import check_output
from rayjobs.inference.result_identity import data_identity, model_identity
from rayjobs.inference.terminal import FindError, answer_lines, converse
from rayjobs.job_configs.adapter_generate import TERMINAL, Config
from rayjobs.lifecycle import job
from rayjobs.models.base_model import open_tokenizer
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import REJECTED_FILE, open_run
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import resolve_path

logger = logging.getLogger(__name__)


class Checked(NamedTuple):
    """Inputs that `check` has opened."""

    conditioning: ImageConditioning | None
    """the image encoder; None if images are left out"""
    rows: Sequence[InstructionRow]
    """the records of the file, with an error in those that are set aside; none without a file"""
    find_error: FindError
    """record → why it cannot be answered, or an empty text"""
    task: AnswerInstructions


def check(settings: Config, *, weights: bool = True) -> Checked:
    """Check everything that can be checked before a model is loaded.

    weights: False to leave the weights of a base on the hub there.

    Raises a UserError or an AdapterError for the first problem.
    """
    _check_settings(settings)
    needs_encoder = settings.file is not None
    checkpoint, tokenizer, conditioning, saved = settings.open(needs_encoder=needs_encoder, weights=weights)
    pieces, window = open_tokenizer(tokenizer), checkpoint.config.max_seq_len
    own = settings.chat and saved is None and pieces.chat_template is not None
    template = saved_template(settings.template or (CHAT if own else None), pieces, saved)
    task = AnswerInstructions(template, settings.decoding)

    def find_error(record: Record) -> str:
        return describe_error(record, template, pieces, window)

    if settings.image is not None and (conditioning is None or settings.instruction == TERMINAL):
        raise ConfigError("image belongs to an instruction, and needs the vision section of its adapter")
    if settings.file is None:
        if settings.instruction != TERMINAL and (error := find_error(settings.one_record)):
            raise ConfigError(f"instruction: {error}: shorten it or its input")
        return Checked(conditioning, (), find_error, task)
    rows = list(set_aside(read_instructions(cached_path(settings.file)), template, pieces, window))
    reasons = [f"{row.location}: {row.error}" for row in rows if row.error]
    check_rejected_share(reasons, len(rows), settings.max_rejected_fraction, "max_rejected_fraction")
    if conditioning is not None and any(row.record.get("image") for row in rows) and not settings.image_root.is_dir():
        raise ConfigError(f"images: {settings.image_root} is no folder; the file's image paths start from it")
    if len(reasons) == len(rows):
        raise DataError(f"{settings.file}: no record to answer" + (f"; {reasons[0]}" if reasons else ""))
    return Checked(conditioning, rows, find_error, task)


def _check_settings(settings: Config) -> None:
    """Check what needs no model and no records."""
    if settings.chat and (settings.file is not None or settings.instruction != TERMINAL):
        raise ConfigError("chat is on the terminal: give neither instruction nor file with it")
    if settings.file is None:
        if not settings.instruction.strip():
            raise ConfigError(f"instruction is empty: give one, or {TERMINAL} to read instructions from the terminal")
        for name, text in (("instruction", settings.instruction), ("input", settings.input)):
            check_text(text, name)
        if settings.out is not None:
            raise ConfigError("out: names the file of the answers to `file`, which is not given")
        return
    if settings.instruction != TERMINAL:
        raise ConfigError("give either instruction or file, not both")
    if settings.run is None:
        raise ConfigError("run.name: required for a file's answers, but not given")
    if settings.answers_file.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"out must end in .jsonl or .parquet, got {settings.out}")
    if settings.out is not None:
        encoder = settings.vision.encoder if settings.vision else None
        needed = [settings.file, settings.base.path, settings.base.tokenizer, settings.adapter, settings.template]
        needed += [encoder.weights, encoder.config, encoder.name] if encoder else []
        ours = [str(settings.run.folder / name) for name in (REJECTED_FILE, "parts")]
        check_output(settings.out, [*filter(None, needed), *ours])


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    rows = check(settings, weights=False).rows
    instructions = "read from the terminal" if settings.instruction == TERMINAL else settings.instruction
    if settings.file is not None:
        rejected = sum(bool(row.error) for row in rows)
        records = f"{len(rows):,} records" + (f", {rejected:,} set aside" if rejected else "")
        instructions = f"{settings.file} → {settings.answers_file}: {records}"
    table = [["base", settings.base.path], ["adapter", settings.adapter or "none"], ["instructions", instructions]]
    show_table("plan", ["", ""], table)


def run(settings: Config) -> dict[str, Any]:
    """Print the answers and return them; or write those of a file and return its result."""
    if settings.file is not None and settings.run is not None:
        return answer_file(settings)
    conditioning, _, find_error, task = check(settings)
    features = None
    if conditioning is not None and settings.image is not None:
        pixels, error = read_pixels(resolve_path(settings.image), conditioning)
        if pixels is None:
            raise DataError(error)
        features = ImageFeaturizer(conditioning.encoder, default_device()).features([pixels])[0]
    model = load_on_gpu(lambda device: settings.load(device, conditioning))
    model.prepack_weights()

    def answer(record: Record) -> str:
        (text,) = task.answers(model, [record], [features])
        print(text, flush=True)
        return text

    if settings.instruction == TERMINAL:
        return {"answers": (converse if settings.chat else answer_lines)(answer, find_error)}
    return {"answers": [answer(settings.one_record)]}


@job
def answer_file(settings: Config) -> dict[str, Any]:
    """Answer a file of records; return and write `result.json`, with some of the answers for the report."""
    conditioning, rows, _, task = check(settings)
    assert settings.run is not None
    assert settings.file is not None
    records, image_root = [row.record for row in rows if not row.error], str(settings.image_root)
    parts = settings.run.folder / "parts"
    identity = {
        **model_identity(settings, conditioning),
        **data_identity(records, image_root, reads_images=conditioning is not None),
        "template": template_fields(task.template),
        "decoding": to_dict(settings.decoding),
        "batch_size": settings.batch_size,
    }
    check_provenance(parts / IDENTITY, identity)  # before anything of a finished run is overwritten
    folder = open_run(settings.run, settings)
    generated = BatchGenerator(
        task=task,
        schema=ANSWERS,
        parts=parts,
        identity=identity,
        chunk_size=settings.batch_size,
        model=settings,
        conditioning=conditioning,
        image_root=image_root,
        pool=settings.scale,
    ).run(records)
    answers = join_answers(rows, generated.to_pylist())
    rejected = rejected_rows(settings.file, [row for row, _ in answers])
    write_rejected(folder, rejected)
    reasons = [f"{row['record']}: {row['reason']}" for row in rejected]
    listed = str(folder / REJECTED_FILE)
    check_rejected_share(reasons, len(rows), settings.max_rejected_fraction, "max_rejected_fraction", listed=listed)
    write_answers(settings.answers_file, answers)
    shown = [shown_answer(row, answer) for row, answer in answers if not row.error]
    if conditioning is not None:
        _write_image_examples(folder, settings.image_root, shown)
    left_out = 0 if conditioning else sum(bool(record["image"]) for record in records)
    result = {
        "headline": _headline(len(shown), len(rejected), left_out),
        "answers": len(shown),
        "rejected_records": len(rejected),
        "images_left_out": left_out,
        "out": str(settings.answers_file),
        "some_answers": [{n: v for n, v in row.items() if n != "error"} for row in evenly_spaced(shown)],
    }
    write_result(folder, result)
    logger.info("%s in %s", result["headline"], settings.answers_file)
    return result


def _headline(answers: int, rejected: int, left_out: int) -> str:
    headline = f"{answers:,} answers"
    headline += f", {left_out:,} without their image" if left_out else ""
    return headline + (f"; {rejected:,} records set aside" if rejected else "")


def _write_image_examples(folder: Path, image_root: Path, shown: list[Record]) -> None:
    with_image = [row for row in shown if row.get("image")]
    examples = [
        (image_root / row["image"], f"{row['instruction']} {row['answer']}") for row in evenly_spaced(with_image)
    ]
    write_examples(folder, examples, "Some of the records with an image: instruction and answer.")
