"""Answer instructions with a base and its adapter: one from the command line, a file of them, or interactively.

A file is answered by a pool of workers in a run with its own folder and report. The same command resumes an interrupted
run and keeps the answers that are there.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from adapter.instruct import read_records
from rayjobs.cluster.device import default_device
from rayjobs.cluster.remote_model import load_on_gpu
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config, to_dict
from rayjobs.console import show_table
from rayjobs.data.records import prompt_template
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.batch import IDENTITY, BatchGenerator, Record, read_pixels
from rayjobs.inference.identity import data_identity, model_identity
from rayjobs.inference.instructions import (
    ANSWERS,
    AnswerInstructions,
    DecodingConfig,
    evenly_spaced,
    write_answers,
)
from rayjobs.lifecycle import job
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer, open_image_conditioning
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import write_json, write_jsonl
from rayjobs.storage.paths import AnyPath, FileOrName, resolve_path


@config
class Config(AdapterSourceConfig):
    JOB: ClassVar = "adapter-generate"

    instruction: str | None = None
    """One instruction to answer; without it and `file`, instructions are read from the terminal."""
    input: str = ""
    """Input of the instruction."""
    image: AnyPath | None = None
    """Image of the instruction."""
    file: AnyPath | None = None
    """File or URL of records {instruction, input?, image?} to answer: .json, .jsonl or .parquet."""
    images: AnyPath | None = None
    """Folder that the file's image paths start from; null for the file's own folder."""
    out: AnyPath | None = None
    """File or URL for the answers to `file`: .jsonl or .parquet; null for `answers.jsonl` in the run folder."""
    template: FileOrName | None = None
    """Prompt template: 'alpaca', the default, 'scienceqa', or a JSON file with 'with_input' and 'without_input'."""
    decoding: DecodingConfig = DecodingConfig()
    batch_size: int = Field(default=16, ge=1)
    """Prompts per batch of a worker."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig | None = None
    """Run folder and cache for the answers to `file`; required with it."""

    @property
    def task(self) -> AnswerInstructions:
        return AnswerInstructions(prompt_template(self.template), self.decoding)


def check(settings: Config) -> ImageConditioning | None:
    """Check everything that can be checked before a model is loaded; return the image encoder.

    Raises a UserError for the first problem.
    """
    if settings.instruction is not None and settings.file is not None:
        raise ConfigError("give either instruction or file, not both")
    settings.base.open()
    prompt_template(settings.template)
    no_image = settings.file is None and settings.vision is None  # then there is no image to leave out
    conditioning = open_image_conditioning(settings.adapter, settings.vision, settings.blind or no_image)
    if settings.image is not None and (conditioning is None or settings.instruction is None):
        raise ConfigError("image belongs to an instruction, and needs the vision section of its adapter")
    if settings.file is not None:
        if settings.run is None:
            raise ConfigError("run.name: required for a file's answers, but not given")
        if settings.out is not None and Path(settings.out).suffix not in (".jsonl", ".parquet"):
            raise ConfigError(f"out must end in .jsonl or .parquet, got {settings.out}")
        next(read_records(cached_path(settings.file), answered=False), None)
    return conditioning


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    check(settings)
    instructions = settings.instruction or "read from the terminal"
    if settings.file is not None:
        instructions = f"{settings.file} → {_out(settings)}"
    rows = [["base", settings.base.path], ["adapter", settings.adapter or "none"], ["instructions", instructions]]
    show_table("plan", ["", ""], rows)


def run(settings: Config) -> dict[str, Any]:
    """Print the answers and return them; or write those of a file and return its result."""
    if settings.file is not None and settings.run is not None:
        return answer_file(settings)
    conditioning = check(settings)
    model = load_on_gpu(lambda device: settings.load(device, conditioning))
    features = None
    if conditioning is not None and settings.image is not None:
        pixels, error = read_pixels(resolve_path(settings.image), conditioning)
        if pixels is None:
            raise DataError(error)
        features = ImageFeaturizer(conditioning.encoder, default_device()).features([pixels])[0]
    answers = []
    for instruction in _instructions(settings):
        answers += settings.task.answers(model, [instruction], [features])
        print(answers[-1], flush=True)
    return {"answers": answers}


@job
def answer_file(settings: Config) -> dict[str, Any]:
    """Answer a file of records; return and write `result.json`, with some of the answers for the report."""
    conditioning = check(settings)
    assert settings.run is not None
    assert settings.file is not None
    file, parts = resolve_path(settings.file), settings.run.folder / "parts"
    image_root = str(resolve_path(settings.images or file.parent))
    records = list(read_records(cached_path(file), answered=False))
    identity = {
        **model_identity(settings, conditioning),
        **data_identity(records, image_root, reads_images=conditioning is not None),
        "how": repr((settings.task.template, to_dict(settings.decoding), settings.batch_size)),
    }
    check_provenance(parts / IDENTITY, identity)  # before anything of a finished run is overwritten
    folder = open_run(settings.run, settings)
    answers = BatchGenerator(
        task=settings.task,
        schema=ANSWERS,
        parts=parts,
        identity=identity,
        chunk_size=settings.batch_size,
        model=settings,
        conditioning=conditioning,
        image_root=image_root,
        pool=settings.scale,
    ).run(records)
    if conditioning is None:
        answers = answers.drop_columns(["image", "image_error"])
    out = _out(settings)
    write_answers(out, answers)
    rows = answers.to_pylist()
    unreadable = [row for row in rows if row.get("image_error")]
    write_jsonl(
        folder / "rejected.jsonl", ({"image": row["image"], "reason": row["image_error"]} for row in unreadable)
    )
    _write_image_examples(folder, resolve_path(image_root), rows)
    left_out = 0 if conditioning else sum(bool(record.get("image")) for record in records)
    without = left_out + len(unreadable)
    result = {
        "headline": f"{len(rows):,} answers" + (f", {without:,} without their image" if without else ""),
        "answers": len(rows),
        "unreadable_images": len(unreadable),
        "images_left_out": left_out,
        "out": str(out),
        "some_answers": evenly_spaced(rows),
    }
    write_json(folder / "result.json", result)
    print(f"{result['headline']} in {out}")
    return result


def _write_image_examples(folder: Path, image_root: Path, rows: list[Record]) -> None:
    read = [row for row in rows if row.get("image") and not row["image_error"]]
    examples = [(image_root / row["image"], f"{row['instruction']} {row['answer']}") for row in evenly_spaced(read)]
    write_examples(folder, examples, "Some of the records with an image: instruction and answer.")


def _out(settings: Config) -> Path:
    """The file of a file's answers."""
    assert settings.run is not None
    return resolve_path(settings.out) if settings.out else settings.run.folder / "answers.jsonl"


def _instructions(settings: Config) -> Iterator[tuple[str, str]]:
    """(instruction, input) pairs: the one of the settings, or each line that is typed."""
    if settings.instruction is not None:
        yield settings.instruction, settings.input
        return
    prompt = "instruction> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line.strip():
            yield line.strip(), ""
