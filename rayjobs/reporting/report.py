"""The report of a run, `report.html`, made from the files that the run left.

Each kind of file has one reader here, which turns it into sections of the page. So a report can be made again at any
time, also of a run that has not finished.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from rayjobs.cluster.hardware import HARDWARE_FILE
from rayjobs.config import flatten, format_value
from rayjobs.errors import DataError, UserError
from rayjobs.reporting import plots
from rayjobs.reporting.example_gallery import EXAMPLES
from rayjobs.reporting.figures import figure_svg, read_figures, unlisted_figures
from rayjobs.reporting.html import Fold, Gallery, Page, Plot, Section, Table, write_page
from rayjobs.reporting.paired_differences import DIFFERENCES_NOTE
from rayjobs.reporting.picture_sections import read_picture_sections
from rayjobs.reporting.set_curves import held_out_sets
from rayjobs.reporting.tables import INTERVAL_NOTE
from rayjobs.runs.record import RECORD_FILE, REPORT_FILE, RESULT_FILE, RunRecord, headline, read_record
from rayjobs.runs.run_dir import REJECTED_FILE
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.files import read_json, read_jsonl
from rayjobs.storage.paths import inside, read_bytes
from rayjobs.storage.yaml_file import read_yaml

logger = logging.getLogger(__name__)
Content = TypeVar("Content")

MAX_ROWS = 50
"""Rows that the page shows of a long table."""
MAX_CELL_CHARS = 300
RUN_COLUMNS = ("run", "job", "state", "started (UTC)", "headline")
HEADER_VALUES = ("headline", "about", "tables", "differences", "reports of the steps")
"""Values of a result that the page shows elsewhere than in its table of values."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, without what cannot be read, which it names.

    The reports of the run's steps are in it too. Raises UserError for a folder that holds no run.
    """
    return write_page(folder / REPORT_FILE, read_page(folder))


def read_page(folder: Path) -> Page:
    """All that a run's report says. Raises UserError for a folder that holds no run."""
    record, problems = _record(folder), list[str]()
    sections: list[Section] = []
    for reader in READERS:
        read_or_warn(partial(_append_sections, reader(folder), sections), folder, problems)
    facts = [record.job, record.state, f"started {_time(record.started)} UTC", f"{record.seconds:,.0f} s"]
    hardware = read_or_warn(_json, folder / HARDWARE_FILE, problems) or {}
    facts += [str(value) for value in hardware.values() if value != "none"]
    about = str((read_or_warn(_json, folder / RESULT_FILE, problems) or {}).get("about", ""))
    steps = read_or_warn(_read_steps, folder, problems) or []
    failure = FAILED.get(record.state, "").format(headline(folder, record) or "no reason is known")
    if problems:
        sections.append(Table("could not be read", [""], [[problem] for problem in dict.fromkeys(problems)]))
    return Page(
        title=folder.name,
        headline="" if failure else headline(folder, record),
        failure=failure,
        facts=facts,
        command=record.command,
        about=about,
        sections=sections,
        steps=steps,
    )


FAILED = {
    "failed": "{}",
    "interrupted": "The run was interrupted; the same command resumes it.",
    "cut off": "The run was cut off, its process is gone; the same command resumes it.",
}
"""States of runs that came to no result, and what a report begins with; braces stand for the error."""
STEPS = "reports of the steps"
"""The value of a result that names the run's steps, {step, report}, and the runs that they are."""


def _read_steps(folder: Path) -> list[Page]:
    """The pages of the steps that a result names or, without any, of the runs inside the run's folder."""
    listed = {str(row["step"]): (folder / row["report"]).parent for row in _json(folder / RESULT_FILE).get(STEPS, [])}
    inside = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{RECORD_FILE}"))}
    runs = {name: run for name, run in (listed or inside).items() if (run / RECORD_FILE).is_file()}
    return [replace(read_page(run), title=name) for name, run in runs.items()]


def _append_sections(generated: Iterator[Section], sections: list[Section], folder: Path) -> None:
    """Append one section after the other, so that those before a damaged file stay."""
    for section in generated:
        sections.append(section)


def read_or_warn(read: Callable[[Path], Content], path: Path, problems: list[str]) -> Content | None:
    """Read a file with `read`; for a damaged file return None, with a warning and the reason added to `problems`."""
    try:
        return read(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
    except (KeyError, TypeError, AttributeError) as error:  # such as a list where an object belongs
        reason = f"{path}: a file holds something else than expected: {error!r}"
    if reason not in problems:
        logger.warning("left out of the report: %s", reason)
        problems.append(reason)
    return None


def run_rows(folders: Sequence[Path]) -> list[list[str]]:
    """A row per run with the values of RUN_COLUMNS after the first. Raises UserError for a folder that holds no run."""
    records = [(folder, _record(folder)) for folder in folders]
    return [[r.job, r.state, _time(r.started), headline(folder, r)] for folder, r in records]


def read_values(path: Path) -> dict[str, str]:
    """The plain values of a `result.json`, {name: text}, without those that the page shows elsewhere.

    Headline and tables have the accuracies, with their intervals.
    """
    values = {
        name: value
        for name, value in _json(path).items()
        if not (name in HEADER_VALUES or name.endswith("accuracy") or value is None or _is_table(value))
    }
    return {_spaced(name).replace(".", ": "): text for name, text in flatten(values).items()}


def read_tables(folder: Path) -> Iterator[Table]:
    """The tables of a run: its test accuracies, their differences, and each list of rows in its `result.json`."""
    test = _json(folder / "test" / RESULT_FILE)
    accuracies = {f"{target}: test accuracy, %": lines for target, lines in test.get("tables", {}).items()}
    for title, lines in {**accuracies, **test.get("differences", {})}.items():
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        rows = [[method, *(line.get(column, "") for column in columns)] for method, line in lines.items()]
        yield _noted(Table(title, ["method", *columns], rows))
    for name, value in _json(folder / RESULT_FILE).items():
        if _is_table(value) and name != STEPS:
            columns = list(dict.fromkeys(column for row in value for column in row))
            rows = [[format_value(row.get(column)) for column in columns] for row in value]
            yield _noted(Table(_spaced(name), [_spaced(column) for column in columns], rows))


def _noted(table: Table) -> Table:
    """The table with a note that explains its intervals, if it has some."""
    cells = [cell for row in table.rows for cell in row]
    if any(re.search(r"[+-][\d.]+ \[", cell) for cell in cells):
        return replace(table, note=DIFFERENCES_NOTE)
    return replace(table, note=INTERVAL_NOTE) if any(re.search(r"\d \[[\d.]+, ", cell) for cell in cells) else table


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise DataError(f"{path}: expected an object with a 'step', a whole number, in each line")
    plain = (int, float, dict, type(None))  # a dict of held-out losses; a table of what each worker has read
    values = [value for row in rows for value in row.values() if not _is_table(value)]
    if wrong := [value for value in values if not isinstance(value, plain)]:
        raise DataError(f"{path}: expected numbers, found {wrong[0]!r:.40}")
    return rows


def read_settings(folder: Path) -> dict[str, str]:
    """The settings of a run's `config.yaml`, {"section.key": text}."""
    path = folder / "config.yaml"
    return flatten(mask_credentials(read_yaml(path))) if path.is_file() else {}


def _record(folder: Path) -> RunRecord:
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder} holds no run: there is no run.json; `rayjobs runs` lists the runs of a folder")
    return record.now()


def _figures(folder: Path) -> Iterator[Section]:
    """The figures that `save_plot` wrote: open ones first, then one fold for each group."""
    folds: dict[str, list[Plot]] = {}
    for source in (folder, folder / "test"):
        for figure in read_figures(source) or unlisted_figures(source):
            drawing = (source / figure.file).read_text(encoding="utf-8")
            if figure.folded:
                folds.setdefault(figure.group, []).append(Plot(figure.title, drawing, figure.caption))
            else:
                yield Plot(figure.full_title, drawing, figure.caption)
    for group, plots_of_group in folds.items():
        yield Fold(group, plots_of_group)


def _values(folder: Path) -> Iterator[Section]:
    """The plain values of the test result and of the run's result."""
    for title, path in (("test", folder / "test" / RESULT_FILE), ("result", folder / RESULT_FILE)):
        if values := read_values(path):
            yield Table(title, ["", ""], list(map(list, values.items())))


def _curves(folder: Path) -> Iterator[Section]:
    """The training curves of the run, or those of a sweep's trials over one another."""
    runs = {folder.name: read_metrics(folder)}
    for path in sorted(folder.glob("trials/*/trial.json")):
        trial = read_json(path)
        runs[f"{trial['setting']}, seed {trial['seed']}"] = read_metrics(path.parent)
    curves = plots.training_curves({name: rows for name, rows in runs.items() if rows})
    for title, (figure, caption) in curves:
        yield Plot(title, figure_svg(figure, f"{folder.name}: {title}"), caption)
    if sets := held_out_sets(runs[folder.name]):
        title = "held-out loss of each set"
        yield Plot(title, figure_svg(sets.figure, f"{folder.name}: {title}"), sets.caption)


def _examples(folder: Path) -> Iterator[Section]:
    """The images that `write_examples` kept, with their captions."""
    for path in (folder / EXAMPLES, folder / "test" / EXAMPLES):
        examples = _json(path)
        images = [
            (read_bytes(inside(path.parent, entry["file"])), entry["caption"]) for entry in examples.get("images", [])
        ]
        if images:
            yield Gallery("examples", images, examples["note"])


def _pictures_of_test(folder: Path) -> Iterator[Section]:
    """The sections of pictures of the test images."""
    yield from read_picture_sections(folder / "test")


def _class_descriptions(folder: Path) -> Iterator[Section]:
    """The descriptions of each class."""
    if prompts := _json(folder / "prompts.json"):
        rows = [[name, "\n".join(descriptions)] for name, descriptions in prompts.items()]
        yield _shortened(Table("class descriptions", ["class", "descriptions"], rows), "prompts.json")


def _rejected(folder: Path) -> Iterator[Section]:
    """The records and images that could not be used, with the reasons."""
    for title, path in (("rejected", folder / REJECTED_FILE), ("rejected on test", folder / "test" / REJECTED_FILE)):
        if rows := read_jsonl(path) if path.is_file() else []:
            columns = list(dict.fromkeys(column for row in rows for column in row if row[column] not in (None, "")))
            lines = [[format_value(row.get(column)) for column in columns] for row in rows]
            yield _shortened(Table(title, [_spaced(column) for column in columns], lines), path.name)


def _settings(folder: Path) -> Iterator[Section]:
    """The run's settings and the versions that it ran with, folded."""
    if settings := read_settings(folder):
        yield Fold("settings", [Table("", ["", ""], list(map(list, settings.items())))])
    if versions := _json(folder / "versions.json"):
        yield Fold("versions", [Table("", ["", ""], [[name, str(version)] for name, version in versions.items()])])


READERS: list[Callable[[Path], Iterator[Section]]] = [
    read_picture_sections,
    read_tables,
    _figures,
    _values,
    _curves,
    _examples,
    _pictures_of_test,
    _class_descriptions,
    _rejected,
    _settings,
]
"""The readers in the order of the page."""


def _shortened(table: Table, file: str) -> Table:
    """The first rows of a table, with long cells cut and a note that names the file with all rows."""
    rows = [[_cut(cell) for cell in row] for row in table.rows[:MAX_ROWS]]
    note = f"The first {MAX_ROWS} of {len(table.rows):,}; all are in {file}." if len(table.rows) > MAX_ROWS else ""
    return replace(table, rows=rows, note=note)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CELL_CHARS else f"{text[:MAX_CELL_CHARS]} …"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file. Raises DataError for anything else."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {value!r:.60}")
    return value


def _time(iso: str) -> str:
    return iso.replace("T", " ").removesuffix("+00:00")


def _spaced(name: str) -> str:
    return name.replace("_", " ")
