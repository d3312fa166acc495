"""Terminal output: the log, progress bars and tables. The one place that knows rich."""

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from rayjobs.storage.credentials import mask_credentials

logger = logging.getLogger(__name__)


def verbose() -> bool:
    """True if the command line has --verbose: Ray and DeepSpeed may then write to the terminal."""
    return os.environ.get("RAYJOBS_VERBOSE") == "1"


_TERMINAL_CODES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -~])?"  # sequences: colours, titles, others
    r"|[\x00-\x08\x0b-\x1f\x7f]"  # control characters but tab and newline
)


def printable(text: str) -> str:
    """The text without terminal codes, such as Ray's colours, and without the credentials of URLs."""
    return mask_credentials(_TERMINAL_CODES.sub("", text))


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, which a progress bar replaces so that lines appear above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


def setup_logging() -> None:
    """Send this project's log to stderr: plain messages, with --verbose also the debug ones and their module.

    A worker needs no setup: Python itself writes warnings to stderr, which Ray forwards.
    """
    root = logging.getLogger("rayjobs")
    root.setLevel(logging.DEBUG if verbose() else logging.INFO)
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbose() else "%(message)s"))
    root.handlers = [handler]


class _SpeedColumn(ProgressColumn):
    """The task's speed in its own unit."""

    def render(self, task: Task) -> Text:
        return Text(_speed(task))


def _speed(task: Task) -> str:
    """The mean speed since the first advance, which shows when the work began; empty until a second has passed."""
    if not task.speed or not task.fields["timed"]:
        return ""
    return f"{task.speed:{',.0f' if task.speed >= 100 else '.3g'}} {task.fields['unit']}/s"


class Progress:
    """Progress of one piece of work: a live bar on a terminal, a log line every few seconds elsewhere."""

    PLAIN_EVERY_S = 10.0
    TIMED_FROM_S = 1.0
    """Shortest time between two advances that a speed is told of."""

    def __init__(self, title: str, *, unit: str, total: int | None = None, done: int = 0) -> None:
        """done: units that were finished before, which count neither for the speed nor for the time left."""
        self.title, self.unit, self.total, self.done = title, unit, total, done
        self.note = ""
        self.table: Sequence[Sequence[str]] = ()
        self.first_advance: float | None = None
        self.logged = (0, "")

    def __enter__(self) -> "Progress":
        console = Console(stderr=True)
        self.bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if console.width >= 100 else 6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeElapsedColumn(),
            _SpeedColumn(),
            TimeRemainingColumn(),
            # The note is cut before any other column.
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            get_time=lambda: time.monotonic(),
            speed_estimate_period=3600.0,  # some work advances once in several minutes
            expand=True,
        )
        self.task = self.bar.add_task(
            self.title, total=self.total, completed=self.done, unit=self.unit, note="", timed=False
        )
        self.printed = time.monotonic()
        self.live = None
        if sys.stderr.isatty():
            self.live = Live(get_renderable=self._render, console=console, refresh_per_second=10)
            self.live.start()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for Ray Tune, which pickles its callbacks at the start: the display stays in this process."""
        return {name: value for name, value in vars(self).items() if name not in ("bar", "live")}

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
        elif self.done and self.logged != (self.done, self.note):
            self._log()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", table: Sequence[Sequence[str]] = ()) -> None:
        """Set how much is done, a note such as the loss, and a table, its header first, that only a terminal shows."""
        now = time.monotonic()
        if done > self.done and self.first_advance is None:
            self.first_advance = now
        timed = self.first_advance is not None and now - self.first_advance >= self.TIMED_FROM_S
        self.done, self.note, self.table = done, note or self.note, table
        self.bar.update(self.task, completed=done, note="" if len(table) > 1 else self.note, timed=timed)
        if self.live is None and now - self.printed > self.PLAIN_EVERY_S:
            self._log()

    def _render(self) -> RichProgress | Group:
        if len(self.table) < 2:
            return self.bar
        grid = Table(*(Column(Text(name)) for name in self.table[0]), box=None, pad_edge=False, header_style="dim")
        for row in self.table[1:]:
            grid.add_row(*map(Text, row))
        return Group(self.bar, grid)

    def _log(self) -> None:
        self.printed, self.logged = time.monotonic(), (self.done, self.note)
        (task,) = self.bar.tasks
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        left = f"{task.time_remaining:.0f} s left" if task.time_remaining else ""
        pace = ", ".join(part for part in (_speed(task), left) if part) if task.fields["timed"] else ""
        status = f"{self.title}: {count} {self.unit} in {task.elapsed or 0:.0f} s"
        logger.info("%s", "  ".join(part for part in (status, pace, self.note) if part))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; one without column names has no header. Cells are shown as they are, brackets included, but for
    terminal codes and credentials of URLs."""
    grid = Table(title=Text(title), title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for column in columns:
        grid.add_column(Text(column), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(grid)


def show_result(title: str, result: Mapping[str, Any]) -> None:
    """Print the plain values of a job's result, a line each; its lists of rows are tables of their own."""
    plain = {name: value for name, value in result.items() if not isinstance(value, list)}
    show_table(title, ["", ""], [[name.replace("_", " "), _one_line(value)] for name, value in plain.items()])


def _one_line(value: Any) -> str:
    return "; ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
