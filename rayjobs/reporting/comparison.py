"""Compare several runs on one page: results side by side, curves over one another, and the settings that differ."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayjobs.errors import DataError
from rayjobs.reporting import plots
from rayjobs.reporting.figures import figure_svg
from rayjobs.reporting.html import Page, Plot, Section, Table, write_page
from rayjobs.reporting.report import (
    FAILED,
    RUN_COLUMNS,
    read_metrics,
    read_or_warn,
    read_settings,
    read_tables,
    read_values,
    run_rows,
)
from rayjobs.storage.files import read_parquet

Values = Mapping[str, Mapping[str, str]]
"""run → {name: text}"""


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs to `out`, without what cannot be read, which it names.

    Raises UserError for a folder that holds no run, or if `out` is a folder.
    """
    if out.is_dir():
        raise DataError(f"{out} is a folder: give the file to write, such as --out {out / 'comparison.html'}")
    rows, problems = run_rows(folders), list[str]()
    bad = frozenset(number for number, row in enumerate(rows) if row[RUN_COLUMNS.index("state") - 1] in FAILED)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = dict(zip(names, folders, strict=True))
    sections: list[Section] = [
        Table("runs", RUN_COLUMNS, [[n, *row] for n, row in zip(names, rows, strict=True)], bad_rows=bad)
    ]
    tables = {n: read_or_warn(lambda path: list(read_tables(path)), path, problems) or [] for n, path in runs.items()}
    sections += _joined_tables(tables)
    accuracies = {name: read_or_warn(_read_accuracies, folder, problems) or [] for name, folder in runs.items()}
    sections += _accuracy_plots(accuracies)
    for title, file in (("test", "test/result.json"), ("result", "result.json")):
        values = {name: read_or_warn(read_values, folder / file, problems) or {} for name, folder in runs.items()}
        sections += _side_by_side(title, values)
    metrics = {name: read_or_warn(read_metrics, folder, problems) or [] for name, folder in runs.items()}
    curves = plots.training_curves({name: steps for name, steps in metrics.items() if steps})
    sections += [Plot(title, figure_svg(figure, title), caption) for title, (figure, caption) in curves]
    settings = {name: read_or_warn(read_settings, folder, problems) or {} for name, folder in runs.items()}
    sections += _side_by_side("settings that differ", settings, only_differing=True)
    if problems:
        sections.append(Table("could not be read", [], [[problem] for problem in problems]))
    page = Page(title=" · ".join(names), headline=f"{len(names)} runs side by side", sections=sections)
    return write_page(out, page)


def _side_by_side(title: str, values: Values, *, only_differing: bool = False) -> Iterator[Table]:
    """A table with a line per name and a column per run."""
    names = dict.fromkeys(name for of_run in values.values() for name in of_run)
    lines = [[name, *(of_run.get(name, "") for of_run in values.values())] for name in names]
    lines = [line for line in lines if not only_differing or len(set(line[1:])) > 1]
    if lines:
        yield Table(title, ["", *values], lines)


def _joined_tables(tables: Mapping[str, Sequence[Table]]) -> Iterator[Table]:
    """The runs' tables, those of one title joined."""
    for title in dict.fromkeys(table.title for of_run in tables.values() for table in of_run):
        yield _join(title, {run: table for run, of_run in tables.items() for table in of_run if table.title == title})


def _join(title: str, tables: Mapping[str, Table]) -> Table:
    """One table from each run's table of this title: lines with equal keys below each other, a column for the run."""
    columns = list(dict.fromkeys(column for table in tables.values() for column in table.columns))
    columns.sort(key=_shots_of)
    lines = {run: [_cells(table, row, columns) for row in table.rows] for run, table in tables.items()}
    width = _key_width(columns, list(lines.values()))
    by_key: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for run, of_run in lines.items():
        for line in of_run:
            by_key.setdefault(tuple(line[:width]), []).append((run, line[width:]))
    joined = []
    for key, entries in by_key.items():
        values = [cells for _, cells in entries]
        if len(entries) == len(tables) > 1 and all(cells == values[0] for cells in values):
            entries = [("all", values[0])]
        for i, (run, cells) in enumerate(entries):
            joined.append([*(key if i == 0 else [""] * width), run, *cells])
    notes = dict.fromkeys(table.note for table in tables.values() if table.note)
    return Table(title, [*columns[:width], "run", *columns[width:]], joined, " ".join(notes))


def _cells(table: Table, row: Sequence[str], columns: Sequence[str]) -> list[str]:
    by_column = dict(zip(table.columns, row, strict=True))
    return [by_column.get(column, "") for column in columns]


def _key_width(columns: Sequence[str], runs: Sequence[Sequence[Sequence[str]]]) -> int:
    """The number of leading columns that make a key: no two lines of a run have the same. 1 if no number does."""
    for width in range(1, len(columns)):
        if all(len({tuple(line[:width]) for line in lines}) == len(lines) for lines in runs):
            return width
    return 1


def _shots_of(column: str) -> int:
    """The order of columns: those without a number first, then `1 shot`, `4 shots` and so on."""
    number = re.match(r"\d+", column)
    return int(number[0]) if number else -1


def _read_accuracies(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `accuracy.parquet`; none if it was not scored."""
    path = folder / "test" / "accuracy.parquet"
    rows = read_parquet(path).to_pylist() if path.is_file() else []
    if rows and not {"target", "method", "shots", "accuracy", "images"} <= rows[0].keys():
        raise DataError(
            f"{path}: expected columns target, method, shots, accuracy and images, got {', '.join(rows[0])}"
        )
    return rows


def _accuracy_plots(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[Plot]:
    """A plot of accuracy over shots for each test set, from the rows of each run that was scored on it."""
    by_target: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, rows in runs.items():
        for row in rows:
            by_target.setdefault(row["target"], {}).setdefault(name, []).append(row)
    for target, by_run in by_target.items():
        title = f"accuracy over shots, {target}'s test"
        drawing = plots.accuracy_over_shots({name: plots.Accuracies.of_rows(rows) for name, rows in by_run.items()})
        yield Plot(title, figure_svg(drawing.figure, title), drawing.caption)
