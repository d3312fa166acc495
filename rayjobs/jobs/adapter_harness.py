"""Run tasks of lm-evaluation-harness on a base, with or without an adapter, with a pool of workers.

The harness makes the requests of each task and computes its metrics with their standard errors; workers score and
continue the requests' tokens in batches that share their common beginnings. The same command resumes an interrupted run
and keeps the requests that are done. The run folder has the harness's results.json, and each task's samples in a file.
"""

from typing import Any, NamedTuple

from adapter.records.chat_encoding import stop_ids
from adapter.templates import Template, template_fields
from adapter.tokenizers.base import Tokenizer
from rayjobs.console import show_result, show_table
from rayjobs.data.templates import CHAT, saved_template
from rayjobs.errors import ConfigError
from rayjobs.inference.batch import IDENTITY, BatchGenerator, GenerationTask, Record
from rayjobs.inference.harness_model import harness_lm
from rayjobs.inference.harness_requests import CONTINUATIONS, SCORES, ContinuePrompts
from rayjobs.inference.harness_tasks import describe_results, evaluate, list_names, open_tasks, table_rows
from rayjobs.inference.result_identity import model_identity
from rayjobs.job_configs.adapter_harness import Config
from rayjobs.lifecycle import job
from rayjobs.models.base_model import open_tokenizer
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import write_json, write_jsonl
from rayjobs.storage.fingerprint import fingerprint

RESULTS = "results.json"
"""The harness's results, in its own format, without the samples."""


class Checked(NamedTuple):
    """Inputs that `check` has opened."""

    tokenizer: Tokenizer
    template: Template | None
    """the template of conversations; None without `chat`"""
    window: int
    """most tokens of the model's input"""
    manager: Any
    """the harness's manager of tasks"""
    names: list[str]
    """the tasks, groups and tags"""


def check(settings: Config, *, weights: bool = True) -> Checked:
    """Check everything but the tasks' data before a worker starts. Raises a UserError for the first problem.

    weights: False to leave the weights of a base on the hub there.
    """
    if settings.template is not None and not settings.chat:
        raise ConfigError("template is that of a conversation: set chat=true with it")
    checkpoint, tokenizer, _, saved = settings.open(needs_encoder=False, weights=weights)
    pieces, longest = open_tokenizer(tokenizer), checkpoint.config.max_seq_len
    window = settings.max_length or longest
    if window > longest:
        raise ConfigError(f"max_length is {window}, more than the window of {settings.base.path}, {longest} tokens")
    template = None
    if settings.chat:
        own = saved is None and pieces.chat_template is not None
        template = saved_template(settings.template or (CHAT if own else None), pieces, saved)
    manager, names = open_tasks(settings.tasks, settings.task_folder)
    return Checked(pieces, template, window, manager, names)


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    checked = check(settings, weights=False)
    rows = [
        ["base", settings.base.path],
        ["adapter", settings.adapter or "none"],
        ["tasks", list_names(checked.names)],
        ["task files", settings.task_folder or "the harness's own"],
        ["asked", "in a conversation" if settings.chat else "by plain text"],
        ["documents", f"the first {settings.limit} of each task" if settings.limit else "all"],
        ["workers", str(settings.scale.workers)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Run the tasks; return and write `result.json`, with the harness's own results beside it."""
    checked = check(settings)
    identity = run_identity(settings, checked)
    check_provenance(settings.run.folder / IDENTITY, identity)  # before anything of a finished run is overwritten
    folder = open_run(settings.run, settings)
    lock_provenance(folder / IDENTITY, identity)

    def compute(kind: str, task: GenerationTask, records: list[Record]) -> list[Record]:
        """The rows of the requests of a kind, from the workers."""
        generator = BatchGenerator(
            task=task,
            schema=CONTINUATIONS if isinstance(task, ContinuePrompts) else SCORES,
            parts=folder / "parts" / kind,
            identity={**identity, "requests": fingerprint(records)[:16]},
            chunk_size=settings.batch_size,
            model=settings,
            conditioning=None,
            image_root="",
            pool=settings.scale,
        )
        return generator.run(records).to_pylist()

    lm = harness_lm(
        checked.tokenizer,
        checked.template,
        checked.window,
        compute,
        token_budget=settings.token_budget,
        seed=settings.seed,
    )
    results = evaluate(
        lm,
        checked.manager,
        checked.names,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        chat=settings.chat,
        system=settings.system,
        seed=settings.seed,
        bootstrap_draws=settings.bootstrap_draws,
    )
    for name, samples in results.pop("samples").items():
        write_jsonl(folder / f"samples_{name}.jsonl", samples)
    write_json(folder / RESULTS, results)
    rows = table_rows(results)
    limited = f", on the first {settings.limit} documents" if settings.limit else ""
    result = {"headline": describe_results(rows) + limited, "tasks": rows, "harness": results["lm_eval_version"]}
    write_result(folder, result)
    show_result(settings.run.name, result)
    return result


def run_identity(settings: Config, checked: Checked) -> dict[str, Any]:
    """Identify, by content, everything besides the tasks' data that the results depend on."""
    return {
        **model_identity(settings, None),
        "tasks": checked.names,
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "template": template_fields(checked.template) if checked.template else "none",
        "stops": sorted(stop_ids(checked.template, checked.tokenizer)),
        "system": settings.system,
        "max_length": checked.window,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
    }
