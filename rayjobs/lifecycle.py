"""Wrap a job's run(): keep its run record, close its trackers, write its digests, its report and a model card."""

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayjobs.cluster.errors import call_on_prepared_nodes
from rayjobs.cluster.hardware import HARDWARE_FILE, describe_hardware
from rayjobs.config import replace_paths
from rayjobs.errors import describe_error
from rayjobs.runs.file_digests import write_digests
from rayjobs.runs.record import State, finish_run, forget_run, is_running_here, leave_run, read_record
from rayjobs.runs.trackers import log_outcome
from rayjobs.storage.files import write_json
from rayjobs.storage.hub import pin
from rayjobs.storage.lease import lost_lease

logger = logging.getLogger(__name__)


def job(run: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A job's `run` that also records how it ended and writes `report.html`, whether it succeeded or not.

    A run that left an adapter also gets a model card, `README.md`.

    `run` takes the job's config, which names the job in `JOB` and the run in `run`. A model on the hub is pinned to its
    present commit first, so that all workers read the same files and the run folder says which.

    If another process has taken over the run folder, nothing is written any more and LeaseLostError is raised.
    """

    @functools.wraps(run)
    def run_and_record(settings: Any) -> dict[str, Any]:
        if hasattr(settings, "__pydantic_fields__"):  # a job that is given more than its config has pinned it itself
            settings = replace_paths(settings, pin)
        try:
            try:
                result = call_on_prepared_nodes(functools.partial(run, settings))
                _record_success(settings, result)
            except BaseException as error:
                if lost := lost_lease(settings.run.folder):
                    forget_run(settings.run.folder)
                    raise lost from None
                _record_failure(settings, error)
                raise
            return result
        finally:
            leave_run(settings.run.folder)

    return run_and_record


def _record_failure(settings: Any, error: BaseException) -> None:
    folder: Path = settings.run.folder
    state: State = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    if finish_run(folder, settings.JOB, state, describe_error(error)):
        with suppress(Exception):  # a report that cannot be made must not hide the job's own error
            _report(folder)
        log_outcome(folder, settings.run.track, state)


def _record_success(settings: Any, result: dict[str, Any]) -> None:
    folder: Path = settings.run.folder
    if is_running_here(folder, settings.JOB):
        write_json(folder / HARDWARE_FILE, describe_hardware())  # again, because Ray's cluster is known by now
        log_outcome(folder, settings.run.track, "done", result)
        write_digests(folder)
        finish_run(folder, settings.JOB, "done")  # last, so that a run that is done has its digests
    record = read_record(folder)
    if record and record.state != "running":  # while it runs, this job was a part of another, which reports later
        _report(folder)
    if record and record.state == "done":
        _write_card(folder)


def _write_card(folder: Path) -> None:
    from rayjobs.reporting.model_card import write_card

    try:
        write_card(folder)
    except (ValueError, OSError, KeyError) as error:  # a finished run stays finished
        logger.warning("%s: no model card: %s", folder.name, error)


def _report(folder: Path) -> None:
    from rayjobs.reporting.report import write_report  # matplotlib is slow to import

    write_report(folder)
