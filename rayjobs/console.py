"""Terminal output: the log, progress bars and tables. The one place that knows rich."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
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

SHORT_CELL = 30
"""Characters up to which a figure with its interval is never wrapped."""
HEADER_CELL = 22
"""Characters of the first cell of a row that stay on one line."""
WIDE = 100
"""Columns of a terminal that has room for a long bar."""
COLUMN_GAP = 2
"""Blanks between two columns of a table."""


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
        self.width = console.width
        self.bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if console.width >= WIDE else 6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeElapsedColumn(),
            _SpeedColumn(),
            TimeRemainingColumn(),
            get_time=lambda: time.monotonic(),
            speed_estimate_period=3600.0,  # some work advances once in several minutes
        )
        self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, unit=self.unit, timed=False)
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
        self.bar.update(self.task, completed=done, timed=timed)
        if self.live is None and now - self.printed > self.PLAIN_EVERY_S:
            self._log()

    def _render(self) -> RichProgress | Group:
        """The bar, and below it the table or, without one, the note."""
        if len(self.table) < 2:
            return Group(self.bar, Text(f"  {self.note}", no_wrap=True, overflow="ellipsis")) if self.note else self.bar
        header, *rows = self.table
        shown = next(_split_columns(header, rows, self.width))  # the columns that the terminal has room for
        grid = Table(*(Column(Text(header[i])) for i in shown), box=None, pad_edge=False, header_style="dim")
        for row in rows:
            grid.add_row(*(Text(row[i]) for i in shown))
        return Group(self.bar, grid)

    def _log(self) -> None:
        self.printed, self.logged = time.monotonic(), (self.done, self.note)
        (task,) = self.bar.tasks
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        left = f"{task.time_remaining:.0f} s left" if task.time_remaining else ""
        pace = ", ".join(part for part in (_speed(task), left) if part) if task.fields["timed"] else ""
        status = f"{self.title}: {count} {self.unit} in {task.elapsed or 0:.0f} s"
        logger.info("%s", "  ".join(part for part in (status, pace, self.note) if part))


class _Console(Console):
    """Raises BrokenPipeError, as `print` does, where whoever reads the output has left; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; one without column names has no header.

    On a terminal that is too narrow for it, a table of figures becomes several with some of the columns each, a table
    of texts wraps them between words and, where that is not enough, each row becomes a block of lines. Cells are
    shown as they are, brackets included, but for terminal codes and credentials of URLs.
    """
    names, lines = [printable(name) for name in columns], [[printable(cell) for cell in row] for row in rows]
    console = _Console()
    if len(names) <= 2 or _needed_width(names, lines, whole=True) <= console.width:
        console.print(_grid(title, names, lines, console.width))
        return
    if all(re.match(r"$|[-+(]?\d", cell) and len(cell) <= SHORT_CELL for line in lines for cell in line[1:]):
        for part in _split_columns(names, lines, console.width):
            chosen = [[line[i] for i in part] for line in lines]
            console.print(
                _grid(title if 1 in part else "", [names[i] for i in part], chosen, console.width, whole=True)
            )
    elif _needed_width(names, lines, whole=False) <= console.width:
        console.print(_grid(title, names, lines, console.width))
    else:
        console.print(Text(title, style="italic"))
        for line in lines:
            values = [[name, cell] for name, cell in zip(names[1:], line[1:], strict=True) if cell]
            console.print(Text(": ".join(filter(None, (names[0], line[0]))), style="bold"))
            console.print(_grid("", ["", ""], values, console.width))


def _grid(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, whole: bool = False
) -> Table:
    """A table that keeps the words of its cells whole as far as the terminal has room for them.

    whole: keep the cells of all columns but the first on one line.
    """
    heading = Text(title) if title else None
    grid = Table(title=heading, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    fits = _needed_width(columns, rows, whole=False) <= width
    for number, column in enumerate(columns):
        cells = [column, *(row[number] for row in rows)]
        least = max(_longest_word(cell) for cell in cells) if fits else None
        grid.add_column(Text(column), overflow="fold", min_width=least, no_wrap=whole and number > 0)
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _needed_width(columns: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool) -> int:
    """The columns of the terminal that a table takes with cells on one line or, else, with only their words whole."""
    widths = [max(_cell_width(line[i], whole=whole) for line in (columns, *rows)) for i in range(len(columns))]
    return 2 + sum(width + COLUMN_GAP + 1 for width in widths)


def _cell_width(cell: str, *, whole: bool) -> int:
    longest_line = max(map(cell_len, cell.split("\n")))
    return longest_line if whole else max(_longest_word(cell), min(longest_line, 14))


def _longest_word(cell: str) -> int:
    return max(map(cell_len, cell.split()), default=0)


def _split_columns(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[list[int]]:
    """The columns of each part of a table that is too wide: the first one, and as many others as there is room for.

    The first one may be wrapped between words.
    """
    part = [0]
    first = max(max(_longest_word(line[0]) for line in (columns, *rows)), HEADER_CELL)
    for number in range(1, len(columns)):
        tried = [*part, number]
        cells = [[line[0][:first], *(line[i] for i in tried[1:])] for line in (columns, *rows)]
        if len(part) > 1 and _needed_width(cells[0], cells[1:], whole=True) > width:
            yield part
            tried = [0, number]
        part = tried
    yield part


def show_result(title: str, result: Mapping[str, Any]) -> None:
    """Print the plain values of a job's result, a line each; its lists of rows are tables of their own."""
    plain = {name: value for name, value in result.items() if not isinstance(value, list)}
    show_table(title, ["", ""], [[name.replace("_", " "), _one_line(value)] for name, value in plain.items()])


def _one_line(value: Any) -> str:
    return "; ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
