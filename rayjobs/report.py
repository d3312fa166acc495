"""What a run shows: tables on the terminal at its end, and `report.html`, made from the files that the run left.

Each kind of file has one reader here, which turns it into sections of the report; so a report can be built again at any
time, and is as complete as the run is.
"""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rayjobs import plots
from rayjobs.examples import EXAMPLES
from rayjobs.page import Gallery, Plot, Section, Table, svg, write_page
from rayjobs.runs import REPORT, Record, outcome, read_record
from rayjobs.tables import as_text, atomic_path, flat, read_json, read_jsonl, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_ROWS = 50
RUN_COLUMNS = ("run", "job", "state", "started (UTC)", "headline")


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


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run's folder. Raises ValueError for a folder that holds no run."""
    record = _record(folder)
    sections = [section for reader in READERS for section in reader(folder)]
    facts = [record.job, record.state, f"started {_time(record.started)}", f"{record.seconds:,.0f} s"]
    return write_page(folder / REPORT, folder.name, outcome(folder, record), facts, sections)


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Writes one page with several runs side by side: figures, settings that differ, and curves over one another."""
    rows = run_rows(folders)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    results = [flat(_json(folder / "result.json")) for folder in folders]
    configs = [flat(_config(folder)) for folder in folders]
    sections: list[Section] = [
        Table("runs", RUN_COLUMNS, [[name, *row] for name, row in zip(names, rows, strict=True)])
    ]
    sections.append(Table("figures", ["", *names], _side_by_side(results)))
    differing = [line for line in _side_by_side(configs) if len(set(line[1:])) > 1]
    sections.append(Table("settings that differ", ["", *names], differing))
    curves = {name: _metrics(folder) for name, folder in zip(names, folders, strict=True)}
    sections += [
        Plot(title, svg(figure)) for title, figure in plots.training_curves({n: c for n, c in curves.items() if c})
    ]
    return write_page(out, " · ".join(names), f"{len(names)} runs side by side", [], sections)


def run_rows(folders: Sequence[Path]) -> list[list[str]]:
    """What `RUN_COLUMNS` names after the run itself, for each folder. Raises ValueError for one that holds no run."""
    records = [_record(folder) for folder in folders]
    return [[r.job, r.state, _time(r.started), outcome(f, r)] for r, f in zip(records, folders, strict=True)]


def save_plot(path: Path, title: str, figure: "Figure") -> None:
    """Writes a figure twice under its title: `path`, a PNG to show, and an SVG beside it for the report."""
    drawn = svg(figure)
    start = drawn.index(">") + 1
    write_text(path.with_suffix(".svg"), f"{drawn[:start]}<title>{html.escape(title)}</title>{drawn[start:]}")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _record(folder: Path) -> Record:
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder} holds no run: there is no run.json; `rayjobs runs` lists those there are")
    return record.now()


def _result(folder: Path) -> Iterator[Section]:
    """Figures in one table, and a table for each list of rows."""
    result = _json(folder / "result.json")
    told = {name: value for name, value in result.items() if name != "headline"}  # which heads the page
    plain = [[_spoken(name), as_text(value)] for name, value in told.items() if not isinstance(value, list | dict)]
    if plain:
        yield Table("result", ["", ""], plain)
    for name, value in result.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            columns = list(dict.fromkeys(column for row in value for column in row))
            rows = [[as_text(row.get(column)) for column in columns] for row in value]
            yield Table(_spoken(name), [_spoken(column) for column in columns], rows)


def _curves(folder: Path) -> Iterator[Section]:
    if rows := _metrics(folder):
        for title, figure in plots.training_curves({folder.name: rows}):
            yield Plot(title, svg(figure))


def _test_tables(folder: Path) -> Iterator[Section]:
    for target, lines in _json(folder / "test" / "result.json").get("tables", {}).items():
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        rows = [[method, *(line.get(column, "") for column in columns)] for method, line in lines.items()]
        yield Table(f"{target}: test accuracy, %", ["method", *columns], rows)


def _plots(folder: Path) -> Iterator[Section]:
    """What `save_plot` drew."""
    for path in [*sorted(folder.glob("*.svg")), *sorted((folder / "test").glob("*.svg"))]:
        drawing = path.read_text(encoding="utf-8")
        title = re.search(r"<title>(.*?)</title>", drawing)
        yield Plot(html.unescape(title[1]) if title else path.stem, drawing)


def _examples(folder: Path) -> Iterator[Section]:
    for path in (folder / EXAMPLES, folder / "test" / EXAMPLES):
        if path.is_file():
            found = read_json(path)
            pictures = [((path.parent / one["file"]).read_bytes(), one["caption"]) for one in found["images"]]
            yield Gallery("examples", pictures, found["note"])


def _rejected(folder: Path) -> Iterator[Section]:
    path = folder / "rejected.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    if rows:
        columns = list(dict.fromkeys(column for row in rows[:SHOWN_ROWS] for column in row))
        lines = [[as_text(row.get(column)) for column in columns] for row in rows[:SHOWN_ROWS]]
        more = f"The first {SHOWN_ROWS} of {len(rows)}; all are in {path.name}." if len(rows) > SHOWN_ROWS else ""
        yield Table("rejected", [_spoken(column) for column in columns], lines, more)


def _settings(folder: Path) -> Iterator[Section]:
    settings = [[name, value] for name, value in flat(_config(folder)).items()]
    yield Table("settings", ["", ""], settings, folded=True)
    if versions := _json(folder / "versions.json"):
        yield Table("versions", ["", ""], [[name, str(value)] for name, value in versions.items()], folded=True)


READERS: list[Callable[[Path], Iterator[Section]]] = [
    _test_tables,
    _result,
    _plots,
    _curves,
    _examples,
    _rejected,
    _settings,
]
"""In the order of the report."""


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_jsonl(path) if path.is_file() else []


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "") for column in columns)] for name in names]


def _time(iso: str) -> str:
    return iso.replace("T", " ").removesuffix("+00:00")


def _spoken(name: str) -> str:
    return name.replace("_", " ")
