"""Measures a base, with or without an adapter, on held-out records, spread over workers.

task loss: cross-entropy and perplexity of the records' outputs. task scienceqa: accuracy in the paper's eight classes;
predictions that are there already are kept, so the same command goes on where it stopped.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray.data
from pydantic import Field
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from adapter.scienceqa import read_problems
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.console import Progress, show_table
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.image_source import StoredFeatures
from rayjobs.data.records import RecordsConfig, Source
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches
from rayjobs.data.token_store import IMAGE_LISTS, REJECTED, prepare_tokens
from rayjobs.errors import UserError
from rayjobs.inference.batch import IDENTITY, generate_all
from rayjobs.inference.identity import data_identity, model_identity
from rayjobs.inference.loss import LOSSES, Scorer
from rayjobs.inference.scienceqa import PREDICTIONS, AnswerProblems, Reading, asked, examples, summarise
from rayjobs.lifecycle import job
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, VisionConfig, open_image_conditioning
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.runs.provenance import check_provenance
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import write_json, write_jsonl, write_parquet
from rayjobs.storage.paths import AnyPath, resolve_path


@config
class Config:
    base: BaseModelConfig
    adapter: AnyPath | None = None
    """An adapter file: ours, official v1, litgpt or PEFT; null measures the bare base."""
    vision: VisionConfig | None = None
    """The encoder that the adapter was trained with; null for an adapter, or a base, that reads text alone."""
    blind: bool = False
    """Leave images out, though the adapter reads them: what is it worth without?"""
    task: Literal["loss", "scienceqa"] = "loss"
    """What is measured; scienceqa reads ScienceQA's folder, its test split unless data.path names another."""
    reading: Reading = "generate"
    """How scienceqa is answered: text is generated and the answer read out of it, or the likeliest option is taken."""
    batch_size: int = Field(default=16, ge=1)
    """Problems of scienceqa that one worker answers together."""
    data: RecordsConfig
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per batch and worker, padding included, for task loss."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig


def check(settings: Config) -> tuple[Path, list[Source], ImageConditioning | None]:
    """Everything that can be told before a worker starts: the tokenizer's path, records, encoder. Raises ValueError."""
    _, tokenizer = settings.base.open()
    sources = settings.data.sources()
    if settings.task == "scienceqa":
        if len(sources) != 1:
            raise UserError(f"task scienceqa measures one folder at a time, data.path names {len(sources)}")
        sources = [replace(settings.data, format="scienceqa").source(settings.data.path[0], "test")]
    for source in sources:
        next(iter(source.read()), None)
    return tokenizer, sources, open_image_conditioning(settings.adapter, settings.vision, settings.blind)


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    _, sources, conditioning = check(settings)
    rows = [
        ["base", settings.base.path],
        ["adapter", settings.adapter or "none"],
        ["task", settings.task],
        ["data", ", ".join(f"{source.path} {source.split}".strip() for source in sources)],
        ["images", "left out" if conditioning is None else f"read by {conditioning.encoder.identity}"],
    ]
    show_table("plan", ["", ""], [*rows, ["workers", str(settings.scale.workers)]])


@job
def run(settings: Config) -> dict[str, Any]:
    """Returns and writes `result.json`, with every record's loss or prediction beside it as Parquet."""
    tokenizer, sources, conditioning = check(settings)
    if settings.task == "scienceqa":
        return _scienceqa(settings, sources[0], conditioning)
    folder = open_run(settings.run, settings)
    connect(folder, settings.run.cache_folder)
    resources = settings.scale.resources()
    preprocess = conditioning and conditioning.encoder.preprocess
    store = prepare_tokens(settings.data, tokenizer, settings.run.cache_folder, preprocess=preprocess, run=folder)
    pictures = None
    if settings.vision and conditioning:
        lists, cache = resolve_path(store.folder) / IMAGE_LISTS, settings.run.cache_folder
        pictures = prepare_image_source(
            settings.vision, conditioning, settings.data.sources(), lists, cache, settings.scale, 0
        )
    order = ElasticBatchSampler(
        store=store,
        split="train",
        global_batch=512,
        token_budget=settings.token_budget,
        shuffle_records=4096,
        seed=None,
        pictures=pictures,
    )
    windows = [{"epoch": 0, "window": window} for window in range(order.windows_per_epoch)]
    tables = []
    with (
        ray_data_context(preserve_order=True),
        reraise_user_errors(),
        Progress("eval", unit="records", total=store.rows("train")) as bar,
    ):
        batches = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
            window_micro_batches,
            batch_size=1,
            num_cpus=0.01,
            compute=TaskPoolStrategy(size=min(2, len(windows))),
            fn_kwargs={"order": order, "steps": range(order.steps_per_epoch), "rank": 0, "world": 1},
        )
        scored = batches.map_batches(
            Scorer,
            batch_size=4,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=settings.scale.workers.max),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(
                settings.base,
                settings.adapter,
                conditioning,
                isinstance(pictures, StoredFeatures),
                "cuda" if "GPU" in resources else "cpu",
            ),
        )
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            bar.advance(table.num_rows)
    losses = pa.concat_tables(tables).sort_by("id")
    write_parquet(folder / "losses.parquet", losses, LOSSES)
    labels = sum(losses["labels"].to_pylist())
    loss = math.fsum(losses["loss"].to_pylist()) / labels
    result = {
        "headline": f"loss {loss:.4f}, perplexity {math.exp(loss):.2f}",
        "loss": round(loss, 6),
        "perplexity": round(math.exp(loss), 4),
        "records": losses.num_rows,
        "labelled_tokens": labels,
        "rejected_records": store.rejected,
        "images_left_out": store.images_left_out,
    }
    return _done(settings, folder, result)


def questions(settings: Config, source: Source, *, seen: bool) -> dict[str, str]:
    """What is asked of scienceqa, and how, by content; images too where they are seen."""
    how = (source.template, settings.reading, settings.data.max_length, settings.batch_size)
    problems = [asked(problem) for problem in read_problems(resolve_path(source.path), source.split)]
    return {**data_identity(problems, source.images, seen), "how": repr(how)}


def _scienceqa(settings: Config, source: Source, conditioning: ImageConditioning | None) -> dict[str, Any]:
    problems = read_problems(resolve_path(source.path), source.split)
    identity = {
        **model_identity(settings.base, settings.adapter, conditioning),
        **questions(settings, source, seen=conditioning is not None),
    }
    check_provenance(
        settings.run.folder / "parts" / IDENTITY, identity
    )  # before anything is written over a finished run
    folder = open_run(settings.run, settings)
    predictions = generate_all(
        map(asked, problems),
        AnswerProblems(source.template, settings.reading, settings.data.max_length),
        PREDICTIONS,
        folder / "parts",
        identity,
        batch=settings.batch_size,
        base=settings.base,
        adapter=settings.adapter,
        conditioning=conditioning,
        images=source.images,
        scale=settings.scale,
    )
    write_parquet(folder / "predictions.parquet", predictions, PREDICTIONS)
    told = [{"pid": row["pid"], "reason": row["error"] or row["image_error"]} for row in predictions.to_pylist()]
    write_jsonl(folder / REJECTED, (row for row in told if row["reason"]))
    write_examples(folder, *examples(problems, predictions.to_pylist(), resolve_path(source.images)))
    result = summarise(settings.run.name, problems, predictions, folder)
    result["images_left_out"] = result["with_image"] if conditioning is None else 0
    across = zip(*(row.values() for row in result["accuracy_by_class"]), strict=True)  # a terminal is narrow
    names, *lines = [[name, *cells] for name, cells in zip(result["accuracy_by_class"][0], across, strict=True)]
    show_table(source.path, names, lines)
    return _done(settings, folder, result)


def _done(settings: Config, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / "result.json", result)
    plain = [[name.replace("_", " "), str(value)] for name, value in result.items() if not isinstance(value, list)]
    show_table(settings.run.name, ["", ""], plain)
    return result
