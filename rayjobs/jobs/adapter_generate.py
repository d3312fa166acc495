"""Answers instructions: one given on the command line, a file of them (batched over workers), or whoever types.

A file is answered by a run with a folder and a report; what is answered already is kept there, so the same command goes
on where it stopped.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field
from torch import Tensor

from adapter.instruct import read_records
from adapter.model import AdaptedModel
from rayjobs.cluster.remote_model import default_device, on_gpu
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.console import show_table
from rayjobs.data.records import prompt_template
from rayjobs.errors import UserError
from rayjobs.inference.batch import IDENTITY, Record, generate_all, read_pixels
from rayjobs.inference.identity import data_identity, model_identity
from rayjobs.lifecycle import job
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer, VisionConfig, open_image_conditioning
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import write_json, write_jsonl, write_parquet
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import AnyPath, FileOrName, resolve_path

ANSWERS = pa.schema([(name, pa.string()) for name in ("instruction", "input", "image", "image_error", "answer")])


@config
class Decoding:
    """How the next token is chosen; the defaults are LLaMA-Adapter's."""

    max_new_tokens: int = Field(default=256, ge=1)
    """The longest answer."""
    temperature: float = Field(default=0.1, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """Draw from the likeliest tokens that hold this much probability."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""


@config
class Config:
    base: BaseModelConfig
    adapter: AnyPath | None = None
    """An adapter file: ours, official v1, litgpt or PEFT; null asks the bare base."""
    vision: VisionConfig | None = None
    """The encoder that the adapter was trained with; null for an adapter, or a base, that reads text alone."""
    blind: bool = False
    """Leave images out, though the adapter reads them."""
    instruction: str | None = None
    """One instruction to answer."""
    input: str = ""
    """Its input, if it has one."""
    image: AnyPath | None = None
    """Its image, if it has one."""
    file: AnyPath | None = None
    """A file of {instruction, input?, image?}: .json, .jsonl or .parquet; it may be a URL."""
    images: AnyPath | None = None
    """The folder that the file's images start from; null for its own."""
    out: AnyPath | None = None
    """Where a file's answers go: .jsonl or .parquet; it may be a URL. Null for `answers.jsonl` in the run's folder."""
    template: FileOrName | None = None
    """'alpaca', the default, 'scienceqa', or a JSON file with 'with_input' and 'without_input' prompt templates."""
    decoding: Decoding = Decoding()
    batch_size: int = Field(default=16, ge=1)
    """Prompts decoded together by one worker."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig | None = None
    """Of a file's answers."""


def answer(base: AdaptedModel, prompts: list[str], images: list[Tensor | None], decoding: Decoding) -> list[str]:
    """The base's answers, without the space that the tokenizer puts before the first word."""
    answers = base.generate(
        prompts,
        images=images,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
    )
    return [text.strip() for text in answers]


class Ask:
    """What a worker does with a chunk: answers its records."""

    def __init__(self, settings: Config) -> None:
        self.settings, self.template = settings, prompt_template(settings.template)

    def __call__(self, base: AdaptedModel) -> Callable[[list[Record], list[Tensor | None]], list[Record]]:
        def answered(records: list[Record], images: list[Tensor | None]) -> list[Record]:
            prompts = [self.template.render(record["instruction"], record["input"]) for record in records]
            answers = answer(base, prompts, images, self.settings.decoding)
            return [
                {**{name: record.get(name) or "" for name in ANSWERS.names}, "answer": text}
                for record, text in zip(records, answers, strict=True)
            ]

        return answered


def check(settings: Config) -> ImageConditioning | None:
    """Everything that can be told before a model is loaded. Raises ValueError."""
    if settings.instruction is not None and settings.file is not None:
        raise UserError("give either instruction or file, not both")
    settings.base.open()
    prompt_template(settings.template)
    no_image = settings.file is None and settings.vision is None  # then there is none to leave out
    conditioning = open_image_conditioning(settings.adapter, settings.vision, settings.blind or no_image)
    if settings.image is not None and (conditioning is None or settings.instruction is None):
        raise UserError("image belongs to an instruction, and needs the vision section of its adapter")
    if settings.file is not None:
        if settings.run is None:
            raise UserError("run.name: required for a file's answers, but not given")
        if settings.out is not None and Path(settings.out).suffix not in (".jsonl", ".parquet"):
            raise UserError(f"out must end in .jsonl or .parquet, got {settings.out}")
        next(read_records(cached_path(settings.file), answered=False), None)
    return conditioning


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    check(settings)
    asked = settings.instruction or (f"{settings.file} → {_out(settings)}" if settings.file else "whoever types")
    rows = [["base", settings.base.path], ["adapter", settings.adapter or "none"], ["asked by", asked]]
    show_table("plan", ["", ""], rows)


def run(settings: Config) -> dict[str, Any]:
    """Prints the answer, or writes the file of them. Returns the answers, or how many there are and where."""
    if settings.file is not None and settings.run is not None:
        return answer_file(settings)
    conditioning = check(settings)
    encoder = conditioning and conditioning.encoder.identity
    base = on_gpu(lambda default_device: settings.base.load(settings.adapter, default_device, encoder=encoder))
    template, seen = prompt_template(settings.template), None
    if conditioning is not None and settings.image is not None:
        pixels, wrong = read_pixels(resolve_path(settings.image), conditioning)
        if pixels is None:
            raise UserError(wrong)
        seen = ImageFeaturizer(conditioning.encoder, default_device()).features([pixels])[0]
    answers = []
    for instruction, input in _asked(settings):
        answers += answer(base, [template.render(instruction, input)], [seen], settings.decoding)
        print(answers[-1], flush=True)
    return {"answers": answers}


def _asked(settings: Config) -> Iterator[tuple[str, str]]:
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


@job
def answer_file(settings: Config) -> dict[str, Any]:
    """Writes all answers and `result.json`, with some of them for the report."""
    conditioning = check(settings)
    assert settings.run is not None
    assert settings.file is not None
    file, out, parts = resolve_path(settings.file), _out(settings), settings.run.folder / "parts"
    images, template = str(resolve_path(settings.images or file.parent)), prompt_template(settings.template)
    records = list(read_records(cached_path(file), answered=False))
    identity = {
        **model_identity(settings.base, settings.adapter, conditioning),
        **data_identity(records, images, seen=conditioning is not None),
        "how": repr((template, settings.decoding, settings.batch_size)),
    }
    check_provenance(parts / IDENTITY, identity)  # before anything is written over a finished run
    folder = open_run(settings.run, settings)
    table = generate_all(
        records,
        Ask(settings),
        ANSWERS,
        parts,
        identity,
        batch=settings.batch_size,
        base=settings.base,
        adapter=settings.adapter,
        conditioning=conditioning,
        images=images,
        scale=settings.scale,
    )
    if conditioning is None:
        table = table.drop_columns(["image", "image_error"])
    rows = table.to_pylist()
    if out.suffix == ".parquet":
        write_parquet(out, table)
    else:
        write_jsonl(out, rows)
    unread = [row for row in rows if row.get("image_error")]
    told = [{"image": row["image"], "reason": row["image_error"]} for row in unread]
    write_jsonl(folder / "rejected.jsonl", told)
    seen = [row for row in rows if row.get("image") and not row["image_error"]]
    shown = [(resolve_path(images) / row["image"], f"{row['instruction']} {row['answer']}") for row in _some(seen)]
    write_examples(folder, shown, "Some of the records with an image: what was asked and answered.")
    left_out = 0 if conditioning else sum(bool(record.get("image")) for record in records)
    blind = left_out + len(unread)
    result = {
        "headline": f"{len(rows):,} answers" + (f", {blind:,} without their image" if blind else ""),
        "answers": len(rows),
        "unreadable_images": len(unread),
        "images_left_out": left_out,
        "out": str(out),
        "some_answers": _some(rows),
    }
    write_json(folder / "result.json", result)
    print(f"{result['headline']} in {out}")
    return result


def _out(settings: Config) -> Path:
    """Where a file's answers go."""
    assert settings.run is not None
    return resolve_path(settings.out) if settings.out else settings.run.folder / "answers.jsonl"


def _some(rows: list[Record], count: int = 12) -> list[Record]:
    """Evenly drawn."""
    return rows[:: max(1, len(rows) // count)][:count]
