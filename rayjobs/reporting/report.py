"""What a run shows: tables on the terminal at its end, and `report.html`, made from the files that the run left.

Each kind of file has one reader here, which turns it into sections of the report; so a report can be built again at any
time, and is as complete as the run is.
"""

import html
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayjobs.cluster.hardware import HARDWARE_FILE
from rayjobs.config import flatten, format_value
from rayjobs.errors import UserError
from rayjobs.reporting import plots
from rayjobs.reporting.example_gallery import EXAMPLES
from rayjobs.reporting.figures import figure_svg
from rayjobs.reporting.html import Fold, Gallery, Plot, Section, Table, write_page
from rayjobs.runs.record import REPORT_FILE, RunRecord, headline, read_record
from rayjobs.storage.files import read_json, read_jsonl
from rayjobs.storage.yaml_file import read_yaml

if TYPE_CHECKING:
    pass


SHOWN_ROWS = 50
SHOWN_CHARS = 300
RUN_COLUMNS = ("run", "job", "state", "started (UTC)", "headline")
KINDS = ("shots", "landscape", "classes", "confusion", "sources")
"""Of numbered and other plots, by the beginning of their file's name, in the order of the report."""


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run's folder. Raises ValueError for a folder that holds no run."""
    record = _record(folder)
    sections = [section for reader in READERS for section in reader(folder)]
    facts = [record.job, record.state, f"started {_time(record.started)} UTC", f"{record.seconds:,.0f} s"]
    facts += [value for value in _json(folder / HARDWARE_FILE).values() if value != "none"]
    told = {"command": record.command, "about": str(_json(folder / "result.json").get("about", ""))}
    return write_page(folder / REPORT_FILE, folder.name, headline(folder, record), facts, sections, **told)


def run_rows(folders: Sequence[Path]) -> list[list[str]]:
    """What `RUN_COLUMNS` names after the run itself, for each folder. Raises ValueError for one that holds no run."""
    records = [_record(folder) for folder in folders]
    return [[r.job, r.state, _time(r.started), headline(f, r)] for r, f in zip(records, folders, strict=True)]


def figures(path: Path) -> dict[str, str]:
    """The plain figures of a `result.json`, but for what heads the page."""
    told = {
        name: value
        for name, value in _json(path).items()
        if name not in ("headline", "about", "tables") and value is not None and not _rows(value)
    }
    return {_spoken(name).replace(".", ": "): text for name, text in flatten(told).items()}


def tables(folder: Path) -> Iterator[Table]:
    """What a run tells in rows: test accuracies, and each list of rows of its `result.json`."""
    for target, lines in _json(folder / "test" / "result.json").get("tables", {}).items():
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        rows = [[method, *(line.get(column, "") for column in columns)] for method, line in lines.items()]
        yield Table(f"{target}: test accuracy, %", ["method", *columns], rows)
    for name, value in _json(folder / "result.json").items():
        if _rows(value):
            columns = list(dict.fromkeys(column for row in value for column in row))
            rows = [[format_value(row.get(column)) for column in columns] for row in value]
            yield Table(_spoken(name), [_spoken(column) for column in columns], rows, linked="report")


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_jsonl(path) if path.is_file() else []


def settings(folder: Path) -> dict[str, str]:
    """{"section.key": text}"""
    path = folder / "config.yaml"
    return flatten(read_yaml(path)) if path.is_file() else {}


def _record(folder: Path) -> RunRecord:
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder} holds no run: there is no run.json; `rayjobs runs` lists those there are")
    return record.now()


def _tables(folder: Path) -> Iterator[Section]:
    yield from tables(folder)


def _figures(folder: Path) -> Iterator[Section]:
    for title, path in (("test", folder / "test" / "result.json"), ("result", folder / "result.json")):
        if found := figures(path):
            yield Table(title, ["", ""], list(map(list, found.items())))


def _curves(folder: Path) -> Iterator[Section]:
    """A run's own, or those of a sweep's trials over one another."""
    runs = {folder.name: metrics(folder)}
    for path in sorted(folder.glob("trials/*/trial.json")):
        trial = read_json(path)
        runs[f"{trial['setting']}, seed {trial['seed']}"] = metrics(path.parent)
    for title, figure in plots.training_curves({name: rows for name, rows in runs.items() if rows}):
        yield Plot(title, figure_svg(figure))


def _plots(folder: Path) -> Iterator[Section]:
    """What `save_plot` drew."""
    folded: dict[str, list[Plot]] = {}
    for path in sorted([*folder.glob("*.svg"), *(folder / "test").glob("*.svg")], key=_place):
        drawing = path.read_text(encoding="utf-8")
        titled = re.search(r"<title>(.*?)</title>", drawing)
        title = html.unescape(titled[1]) if titled else path.stem
        if _place(path)[0] > 0:
            of, _, what = title.rpartition(": ")
            folded.setdefault(of, []).append(Plot(what, drawing))
        else:
            yield Plot(title, drawing)
    for of, drawings in folded.items():
        yield Fold(of, drawings)


def _place(path: Path) -> tuple[int, int, str]:
    """In the report: plots without a number first, then by number, then by kind."""
    kind, _, number = path.stem.partition("-")
    return int(number) if number.isdigit() else -1, KINDS.index(kind) if kind in KINDS else len(KINDS), path.name


def _examples(folder: Path) -> Iterator[Section]:
    for path in (folder / EXAMPLES, folder / "test" / EXAMPLES):
        found = _json(path)
        pictures = [((path.parent / one["file"]).read_bytes(), one["caption"]) for one in found.get("images", [])]
        if pictures:
            yield Gallery("examples", pictures, found["note"])


def _sentences(folder: Path) -> Iterator[Section]:
    """What a language model said about each class."""
    if prompts := _json(folder / "prompts.json"):
        rows = [[name, "\n".join(sentences)] for name, sentences in prompts.items()]
        yield _first(Table("sentences", ["class", "sentences"], rows), "prompts.json")


def _rejected(folder: Path) -> Iterator[Section]:
    for title, path in (("rejected", folder / "rejected.jsonl"), ("rejected on test", folder / "test/rejected.jsonl")):
        if rows := read_jsonl(path) if path.is_file() else []:
            columns = list(dict.fromkeys(column for row in rows for column in row if row[column] not in (None, "")))
            lines = [[format_value(row.get(column)) for column in columns] for row in rows]
            yield _first(Table(title, [_spoken(column) for column in columns], lines), path.name)


def _settings(folder: Path) -> Iterator[Section]:
    found = {"settings": settings(folder), "versions": _json(folder / "versions.json")}
    for title, values in found.items():
        if values:
            yield Fold(title, [Table("", ["", ""], [[name, str(value)] for name, value in values.items()])])


READERS: list[Callable[[Path], Iterator[Section]]] = [
    _tables,
    _plots,
    _figures,
    _curves,
    _examples,
    _sentences,
    _rejected,
    _settings,
]
"""In the order of the report."""


def _first(table: Table, file: str) -> Table:
    """What a page has room for of a long table, with a word about the rest."""
    rows = [[_short(cell) for cell in row] for row in table.rows[:SHOWN_ROWS]]
    more = f"The first {SHOWN_ROWS} of {len(table.rows):,}; all are in {file}." if len(table.rows) > SHOWN_ROWS else ""
    return Table(table.title, table.columns, rows, more)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} …"


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _time(iso: str) -> str:
    return iso.replace("T", " ").removesuffix("+00:00")


def _spoken(name: str) -> str:
    return name.replace("_", " ")
