"""Wrap a job's run(): keep its run record, close its trackers, write its report."""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayjobs.cluster.hardware import HARDWARE_FILE, describe_hardware
from rayjobs.runs.record import State, finish_run, read_record
from rayjobs.runs.trackers import log_outcome
from rayjobs.storage.files import write_json


def job(run: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A job's `run` that also notes how it ended, and leaves `report.html` in its folder, however it ended."""

    @functools.wraps(run)
    def whole(settings: Any) -> dict[str, Any]:
        try:
            result = run(settings)
        except BaseException as error:
            state: State = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if finish_run(settings, state, str(error) or type(error).__name__):
                with suppress(Exception):  # the error is what matters
                    _show(settings.run.folder)
                log_outcome(settings.run.folder, settings.run.track, state)
            raise
        if finish_run(settings, "done"):
            write_json(
                settings.run.folder / HARDWARE_FILE, describe_hardware()
            )  # the cluster too, which is connected to by now
            log_outcome(settings.run.folder, settings.run.track, "done", result)
        if (record := read_record(settings.run.folder)) and record.state != "running":  # as it is for a part of another
            _show(settings.run.folder)
        return result

    return whole


def _show(folder: Path) -> None:
    from rayjobs.reporting.report import write_report  # matplotlib is slow to import

    write_report(folder)
