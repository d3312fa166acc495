"""Several runs on one page: what they found side by side, curves over one another, and the settings that differ."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rayjobs.reporting import plots
from rayjobs.reporting.figures import figure_svg
from rayjobs.reporting.html import Plot, Section, Table, write_page
from rayjobs.reporting.report import RUN_COLUMNS, figures, metrics, run_rows, settings, tables
from rayjobs.storage.files import read_parquet

Columns = Mapping[str, Mapping[str, str]]
"""run → {name: text}"""


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page. Raises ValueError for a folder that holds no run."""
    told = run_rows(folders)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = dict(zip(names, folders, strict=True))
    sections: list[Section] = [Table("runs", RUN_COLUMNS, [[n, *row] for n, row in zip(names, told, strict=True)])]
    sections += _joined({name: list(tables(folder)) for name, folder in runs.items()})
    sections += _shots(runs)
    for title, file in (("test", "test/result.json"), ("result", "result.json")):
        sections += _side_by_side(title, {name: figures(folder / file) for name, folder in runs.items()})
    curves = {name: rows for name, folder in runs.items() if (rows := metrics(folder))}
    sections += [Plot(title, figure_svg(figure)) for title, figure in plots.training_curves(curves)]
    given = {name: settings(folder) for name, folder in runs.items()}
    sections += _side_by_side("settings that differ", given, differing=True)
    return write_page(out, " · ".join(names), f"{len(names)} runs side by side", [], sections)


def _side_by_side(title: str, columns: Columns, *, differing: bool = False) -> Iterator[Table]:
    """A line per name and a column per run."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    lines = [line for line in lines if not differing or len(set(line[1:])) > 1]
    if lines:
        yield Table(title, ["", *columns], lines)


def _joined(found: Mapping[str, Sequence[Table]]) -> Iterator[Table]:
    """Tables of one title as one: lines that are about the same stand under each other, with the run of each."""
    for title in dict.fromkeys(table.title for of_run in found.values() for table in of_run):
        having = {run: table for run, of_run in found.items() for table in of_run if table.title == title}
        columns = list(dict.fromkeys(column for table in having.values() for column in table.columns))
        columns.sort(key=_shots_of)
        lines = {run: [_cells(table, row, columns) for row in table.rows] for run, table in having.items()}
        about = _telling(columns, list(lines.values()))
        said: dict[tuple[str, ...], list[list[str]]] = {}
        for run, rows in lines.items():
            for row in rows:
                said.setdefault(tuple(row[:about]), []).append([run, *row[about:]])
        joined = []
        for first, of_runs in said.items():
            same = len(of_runs) == len(having) > 1 and all(line[1:] == of_runs[0][1:] for line in of_runs)
            shown = [["all", *of_runs[0][1:]]] if same else of_runs
            joined += [[*(first if i == 0 else [""] * about), *line] for i, line in enumerate(shown)]
        yield Table(title, [*columns[:about], "run", *columns[about:]], joined)


def _cells(table: Table, row: Sequence[str], columns: Sequence[str]) -> list[str]:
    named = dict(zip(table.columns, row, strict=True))
    return [named.get(column, "") for column in columns]


def _telling(columns: Sequence[str], of_runs: Sequence[Sequence[Sequence[str]]]) -> int:
    """How many columns it takes to tell the lines of a run apart."""
    for count in range(1, len(columns)):
        if all(len({tuple(row[:count]) for row in rows}) == len(rows) for rows in of_runs):
            return count
    return 1


def _shots_of(column: str) -> int:
    """Columns such as `4 shots` follow the others, in their order."""
    number = re.match(r"\d+", column)
    return int(number[0]) if number else -1


def _shots(runs: Mapping[str, Path]) -> Iterator[Plot]:
    """Accuracy over shots on each test set."""
    scored: dict[str, dict[str, list[dict]]] = {}
    for name, folder in runs.items():
        path = folder / "test" / "accuracy.parquet"
        for row in read_parquet(path).to_pylist() if path.is_file() else []:
            scored.setdefault(row["target"], {}).setdefault(name, []).append(row)
    for target, of_runs in scored.items():
        from rayjobs.reporting.accuracy_tables import by_method  # imports torch, which other pages do without

        methods, levels = {}, {}
        for name, rows in of_runs.items():
            methods[name], levels[name] = by_method(rows)
        yield Plot(f"accuracy over shots, {target}'s test", figure_svg(plots.accuracy_over_shots(methods, levels)))
