"""Terminal output: progress bars and tables."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def verbose() -> bool:
    """Whether Ray and DeepSpeed may be heard: the command line's --verbose."""
    return os.environ.get("RAYJOBS_VERBOSE") == "1"


class Progress:
    """One line of progress: a live bar on a terminal, a plain line every few seconds otherwise."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, title: str, *, unit: str, total: int | None = None, done: int = 0) -> None:
        """done: what was there before."""
        self.title, self.unit, self.total = title, unit, total
        self.done, self.note = done, ""
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        self.started = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
            from rich.table import Column, Table

            class WithTable(Bar):
                table: Sequence[Sequence[str]] = ()

                def get_renderables(self) -> Iterator[Any]:
                    yield self.make_tasks_table(self.tasks)
                    if len(self.table) > 1:
                        grid = Table(*self.table[0], box=None, pad_edge=False, header_style="dim")
                        for row in self.table[1:]:
                            grid.add_row(*row)
                        yield grid

            console = Console(stderr=True)
            self.bar = WithTable(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24 if console.width >= 100 else 6),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeElapsedColumn(),
                TextColumn("{task.fields[pace]}"),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),  # cut before the others
                console=console,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, pace="", note="")
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For Ray Tune, which writes its callbacks down as they begin: the display stays where it is."""
        return {name: value for name, value in vars(self).items() if name != "bar"}

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.done:
            self._print()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", table: Sequence[Sequence[str]] = ()) -> None:
        """Sets how much is done, with a note such as the loss, and a table, its columns first, that only a terminal
        shows."""
        if self.first is None and done > self.done:
            self.first = time.monotonic(), done
        self.done, self.note = done, note or self.note
        if self.bar is not None:
            self.bar.table = table
            note = "" if len(table) > 1 else self.note
            self.bar.update(self.task, completed=done, pace=self._pace(), note=note)
        elif time.monotonic() - self.printed > self.PLAIN_EVERY_S:
            self._print()

    def _pace(self) -> str:
        """How fast it goes, and until when: since the first update, so that neither the start nor what was there before
        counts, and not before a second has passed since."""
        seconds, made = (time.monotonic() - self.first[0], self.done - self.first[1]) if self.first else (0.0, 0)
        if seconds < 1 or not made:
            return ""
        rest = (self.total or 0) - self.done
        left = f", {rest * seconds / made:.0f} s left" if rest > 0 else ""
        rate = made / seconds
        return f"{rate:,.0f} {self.unit}/s{left}" if rate >= 100 else f"{rate:.3g} {self.unit}/s{left}"

    def _print(self) -> None:
        self.printed = time.monotonic()
        of = f"/{self.total}" if self.total else ""
        done = f"{self.title}: {self.done}{of} {self.unit} in {self.printed - self.started:.0f} s"
        print("  ".join(part for part in (done, self._pace(), self.note) if part), file=sys.stderr, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; a table without column names has no header."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    table = Grid(title=title, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
