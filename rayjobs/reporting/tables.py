"""Write a table of text as Markdown and CSV, and the cells of means; `console.show_table` prints a table."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from rayjobs.storage.files import write_text

Rows = Sequence[Sequence[str]]


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """A Markdown table, its first column aligned left and the others right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [[_cell(text) for text in columns], rule, *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_deviation(values: Sequence[float], digits: int, factor: float = 1) -> str:
    """Mean ± sample standard deviation, both times `factor` (100 for percent); the mean alone of a single value."""
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write_csv(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write a table as a CSV file, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
