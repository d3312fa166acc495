"""Answers instructions: one given on the command line, a file of them (batched over workers), or whoever types.

With `file`, answers go to `out`; parts that are done are kept beside it, so the same command goes on where it stopped.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from pydantic import Field
from ray.data import ActorPoolStrategy

from adapter.base import Base
from adapter.checkpoint import read_adapter
from adapter.instruct import ALPACA, PromptTemplate, read_records
from rayjobs.base import BaseConfig, PoolConfig
from rayjobs.config import config
from rayjobs.report import show_table
from rayjobs.runtime import Progress, connect, data_context, unwrapped
from rayjobs.tables import read_json, write_json, write_jsonl, write_parquet

ANSWERS = pa.schema([(name, pa.string()) for name in ("instruction", "input", "answer")])


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
    base: BaseConfig
    adapter: str | None = None
    """An adapter file: ours, official v1, litgpt or PEFT; null asks the bare base."""
    instruction: str | None = None
    """One instruction to answer."""
    input: str = ""
    """Its input, if it has one."""
    file: str | None = None
    """A file of {instruction, input?}: .json, .jsonl or .parquet."""
    out: str = "answers.jsonl"
    """Where a file's answers go: .jsonl or .parquet."""
    template: str = "alpaca"
    """'alpaca', or a JSON file with 'with_input' and 'without_input' prompt templates."""
    decoding: Decoding = Decoding()
    batch_size: int = Field(default=16, ge=1)
    """Prompts decoded together by one worker."""
    scale: PoolConfig = PoolConfig()

    def prompt_template(self) -> PromptTemplate:
        return ALPACA if self.template == "alpaca" else PromptTemplate.read(self.template)


def answer(base: Base, prompts: list[str], decoding: Decoding) -> list[str]:
    """The base's answers, without the space that the tokenizer puts before the first word."""
    answers = base.generate(
        prompts,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
    )
    return [text.strip() for text in answers]


class Answerer:
    """An actor that holds the model and writes one part of the answers per call."""

    def __init__(self, settings: Config, device: str) -> None:
        self.settings, self.template = settings, settings.prompt_template()
        self.base = settings.base.load(settings.adapter, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        records = json.loads(batch["records"][0])
        prompts = [self.template.render(record["instruction"], record["input"]) for record in records]
        answers = answer(self.base, prompts, self.settings.decoding)
        rows = [{**record, "answer": text} for record, text in zip(records, answers, strict=True)]
        write_parquet(Path(batch["part"][0]), pa.Table.from_pylist(rows, ANSWERS))
        return {"answered": [len(rows)]}


def check(settings: Config) -> None:
    """Everything that can be told before a model is loaded. Raises ValueError."""
    if settings.instruction is not None and settings.file is not None:
        raise ValueError("give either instruction or file, not both")
    settings.base.open()
    settings.prompt_template()
    if settings.adapter is not None:
        read_adapter(settings.adapter)
    if settings.file is not None:
        if Path(settings.out).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out must end in .jsonl or .parquet, got {settings.out}")
        next(read_records(settings.file, answered=False), None)


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    check(settings)
    asked = settings.instruction or (f"{settings.file} → {settings.out}" if settings.file else "whoever types")
    rows = [["base", settings.base.path], ["adapter", settings.adapter or "none"], ["asked by", asked]]
    show_table("plan", ["", ""], rows)


def run(settings: Config) -> dict[str, Any]:
    """Prints the answer, or writes the file of them. Returns the answers, or how many there are and where."""
    check(settings)
    if settings.file is not None:
        return _answer_file(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, template = settings.base.load(settings.adapter, device), settings.prompt_template()
    answers = []
    for instruction, input in _asked(settings):
        answers += answer(base, [template.render(instruction, input)], settings.decoding)
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


def _answer_file(settings: Config) -> dict[str, Any]:
    out = Path(settings.out).absolute()
    parts = out.with_name(out.name + ".parts")
    identity = {name: str(getattr(settings, name)) for name in ("base", "adapter", "file", "template", "decoding")}
    identity["batch_size"] = str(settings.batch_size)
    if (parts / "settings.json").exists() and read_json(parts / "settings.json") != identity:
        raise ValueError(f"{parts} holds answers made with other settings: remove it, or choose another out")
    write_json(parts / "settings.json", identity)
    todo: list[dict[str, str]] = []
    files: list[Path] = []
    total = done = 0
    records = read_records(str(settings.file), answered=False)
    while chunk := list(islice(records, settings.batch_size)):
        part = parts / f"{len(files):08d}.parquet"
        files.append(part)
        total += len(chunk)
        if part.exists():
            done += len(chunk)
        else:
            asked = [{"instruction": record["instruction"], "input": record["input"]} for record in chunk]
            todo.append({"part": str(part), "records": json.dumps(asked)})
    if todo:
        connect()
        resources = settings.scale.resources()
        with data_context(preserve_order=False), unwrapped(), Progress("generate", unit="answers", total=total) as bar:
            bar.update(done)
            answered = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
                Answerer,
                batch_size=1,
                compute=ActorPoolStrategy(size=min(settings.scale.workers, len(todo))),
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                fn_constructor_args=(settings, "cuda" if "GPU" in resources else "cpu"),
            )
            for row in answered.iter_rows():
                bar.advance(int(row["answered"]))
    table = pa.concat_tables([ANSWERS.empty_table(), *map(pq.read_table, files)])
    if out.suffix == ".parquet":
        write_parquet(out, table, ANSWERS)
    else:
        write_jsonl(out, table.to_pylist())
    shutil.rmtree(parts)
    print(f"{table.num_rows} answers in {out}")
    return {"answers": table.num_rows, "out": str(out)}
