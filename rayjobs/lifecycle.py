"""Wrap a job's run(): keep its run record, close its trackers, write its report."""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayjobs.cluster.hardware import HARDWARE, hardware
from rayjobs.runs.record import State, _end, read_record
from rayjobs.runs.trackers import log_end
from rayjobs.storage.files import write_json


def recorded(run: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A job's `run` that also notes how it ended, and leaves `report.html` in its folder, however it ended."""

    @functools.wraps(run)
    def whole(settings: Any) -> dict[str, Any]:
        try:
            result = run(settings)
        except BaseException as error:
            state: State = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if _end(settings, state, str(error) or type(error).__name__):
                with suppress(Exception):  # the error is what matters
                    _show(settings.run.folder)
                log_end(settings.run.folder, settings.run.track, state)
            raise
        if _end(settings, "done"):
            write_json(settings.run.folder / HARDWARE, hardware())  # the cluster too, which is connected to by now
            log_end(settings.run.folder, settings.run.track, "done", result)
        if (record := read_record(settings.run.folder)) and record.state != "running":  # as it is for a part of another
            _show(settings.run.folder)
        return result

    return whole


def _show(folder: Path) -> None:
    from rayjobs.reporting.report import write_report  # matplotlib is slow to import

    write_report(folder)
