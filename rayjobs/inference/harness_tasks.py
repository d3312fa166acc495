"""The tasks of lm-evaluation-harness: found by name, run on a model, and their results as a table."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayjobs.cluster.environment import set_unless_given
from rayjobs.console import verbose
from rayjobs.errors import ConfigError, is_user_error
from rayjobs.inference.task_files import check_task_files

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""The metrics that a headline shows, the first that a task has; of a task without any, its first metric."""


def open_tasks(names: Sequence[str], folder: str | None) -> tuple[Any, list[str]]:
    """The harness's manager of tasks, and the names of tasks, groups and tags that patterns stand for.

    folder: local folder of task files; None for the harness's own tasks. Raises ConfigError if the harness is not
    installed, if there is no such folder or task, and for a task file that cannot be read.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"task_folder is {folder}, which is no folder")
    set_unless_given({"DISABLE_MULTIPROC": "1"})  # its pools would fork a process with Ray's threads
    if not verbose():
        set_unless_given({"TQDM_DISABLE": "1"})
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"this job needs lm-evaluation-harness: pip install 'rayjobs[harness]' ({error})") from error
    place = folder or "the harness's own tasks"
    if folder is not None:
        check_task_files(Path(folder))
    with _loading(place):
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if nameless := [name for name in manager.all_tasks if not isinstance(name, str)]:
        raise ConfigError(f"task_folder: a file of {place} names its task {nameless[0]!r}; write a text after `task:`")
    found = {name: manager.match_tasks([name]) for name in names}
    for name, matches in found.items():
        if not matches:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            known = (
                f"did you mean {' or '.join(close)}?" if close else f"it has {list_names(manager.all_tasks) or 'none'}"
            )
            raise ConfigError(f"tasks: {name!r} is no task of {place}; {known}")
    return manager, list(dict.fromkeys(match for matches in found.values() for match in matches))


def list_names(names: Sequence[str], most: int = 20) -> str:
    """The first names in a line, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The named tasks and groups, with their data. Raises ConfigError for one that cannot be loaded."""
    with _loading(", ".join(names)):
        loaded = manager.load(list(names))
    inside = {child for group in loaded["groups"].values() for child in group.child_names}
    everything = {**loaded["groups"], **loaded["tasks"]}
    return [one for name, one in everything.items() if name not in inside]


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn whatever the harness raises over task files and their data into a ConfigError that names them."""
    try:
        yield
    except Exception as error:
        if is_user_error(error):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{what}: the harness cannot load it: {type(error).__name__}: {reason}") from error


def evaluate(
    lm: Any,
    manager: Any,
    names: Sequence[str],
    *,
    num_fewshot: int | None,
    limit: int | None,
    chat: bool,
    system: str | None,
    seed: int,
    bootstrap_draws: int,
) -> dict[str, Any]:
    """The harness's results of tasks, as plain values, with every document's sample under `samples`."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    results = simple_evaluate(
        lm,
        tasks=load_tasks(manager, names),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        system_instruction=system,
        bootstrap_iters=bootstrap_draws,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None
    return json.loads(json.dumps(results, default=handle_non_serializable))


def table_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric of each task and group: task, version, n-shot, filter, metric, value, stderr, documents."""
    rows = []
    for name, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter}")
            rows.append(
                {
                    "task": name,
                    "version": results["versions"].get(name, ""),
                    "n_shot": results["n-shot"].get(name, ""),
                    "filter": filter,
                    "metric": metric,
                    "value": f"{value:.4f}",
                    "stderr": f"{stderr:.4f}" if isinstance(stderr, int | float) else "",
                    "documents": results["n-samples"].get(name, {}).get("effective", ""),
                }
            )
    return rows


def describe_results(rows: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """The main metric of the first tasks, in a line, such as `arc_easy acc_norm 0.5120 ± 0.0103`."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    parts = []
    for task, own in by_task.items():
        main = next((row for name in MAIN_METRICS for row in own if row["metric"] == name), own[0])
        parts.append(f"{task} {main['metric']} {main['value']}" + (f" ± {main['stderr']}" if main["stderr"] else ""))
    return ", ".join(parts[:most]) + (f", and {len(parts) - most} more" if len(parts) > most else "")
