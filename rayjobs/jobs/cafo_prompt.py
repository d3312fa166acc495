"""CaFo, step 1: describe the classes of a data set with a language model, and write `prompts.json`.

The descriptions come from a file in CaFo's format, an OpenAI-compatible endpoint, a LLaMA on this machine with or
without an adapter, or from the templates alone. The same command resumes an interrupted run: no class is asked about
twice.
"""

from typing import Any

from cafo.prompt import read_prompts, template_prompts
from rayjobs.console import show_result, show_table
from rayjobs.data.class_names import ClassNames, open_class_names
from rayjobs.inference.class_descriptions import read_descriptions, write_descriptions
from rayjobs.job_configs.cafo_prompt import Config
from rayjobs.lifecycle import job
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import write_json
from rayjobs.storage.paths import resolve_path

PROMPTS = "prompts.json"


def check(settings: Config, *, weights: bool = True) -> tuple[ClassNames, dict[str, Any]]:
    """Check everything that can be checked before a model is loaded or asked; return the classes and what the
    descriptions depend on. Raises a UserError for the first problem.

    weights: False to leave the weights of a LLaMA on the hub there.
    """
    classes = open_class_names(settings.data, settings.class_names)
    identity = settings.identity(weights=weights)
    if settings.source == "file":
        read_prompts(resolve_path(str(settings.file)), classes.names)
    left_there = not weights and settings.llama is not None and settings.llama.base.bytes_to_fetch() > 0
    if not left_there:
        check_provenance(settings.run.folder / "source.json", identity)
    return classes, identity


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    classes, _ = check(settings, weights=False)
    path = settings.run.folder / PROMPTS
    rows = [["source", settings.source], ["classes", str(len(classes.names))], ["out", str(path)]]
    if settings.source in ("endpoint", "llama"):
        left = len(classes.missing(read_descriptions(path)))
        rows.append(["to ask", f"{left} classes × {len(settings.commands)} commands × {settings.answers} answers"])
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Write `prompts.json`; return and write `result.json`."""
    classes, identity = check(settings)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / "source.json", identity)
    path = folder / PROMPTS
    missing = 0
    if settings.source == "file":
        prompts = read_prompts(resolve_path(str(settings.file)), classes.names)
        write_json(path, prompts)
    elif settings.source == "templates":
        prompts = template_prompts(classes.templates, classes.names)
        write_json(path, prompts)
    else:
        missing = len(classes.missing(read_descriptions(path)))
        prompts = write_descriptions(settings, classes, path) if missing else read_prompts(path, classes.names)
    count = sum(map(len, prompts.values()))
    result = {
        "headline": f"{count} descriptions of {len(classes.names)} classes",
        "source": settings.source,
        "classes": len(classes.names),
        "classes_asked_now": missing,
        "sentences": count,
        "prompts": str(path),
    }
    write_result(folder, result)
    show_result(settings.run.name, result)
    return result
