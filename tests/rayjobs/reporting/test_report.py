"""Reports and records of runs: made from a run's files alone, whole in one page, true about how a run ended."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from rayjobs.__main__ import main
from rayjobs.config import config
from rayjobs.lifecycle import job
from rayjobs.reporting import plots
from rayjobs.reporting.comparison import compare
from rayjobs.reporting.example_gallery import write_examples
from rayjobs.reporting.figures import figure_svg, save_plot
from rayjobs.reporting.report import write_report
from rayjobs.runs.record import RECORD_FILE, find_runs, read_record
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import read_json, write_json, write_jsonl, write_parquet


@config
class Config:
    JOB: ClassVar = "test-report"
    seed: int = 3
    note: str = "<b>bold</b>"
    run: RunConfig


class Reader(HTMLParser):
    """Text by tag, rows of tables, and whatever a page would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.fetched: list[str] = []
        self.tag = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "wbr" or ("class", "word") in attrs:  # says where a word may break
            return
        self.tag = tag
        self.fetched += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cells.append("")
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag != "span":
            self.tag = ""

    def handle_data(self, data: str) -> None:
        if self.tag in ("td", "th"):
            self.cells[-1] += data
            self.rows[-1][-1] += data
        elif self.tag in ("h2", "h3", "h4", "summary") and data.strip():
            self.titles.append(data.strip())


def a_run(storage: Path, name: str, seed: int = 3) -> Path:
    folder = open_run(RunConfig(name=name, storage=str(storage)), Config(seed=seed, run=RunConfig(name=name)))
    write_json(
        folder / "result.json", {"headline": f"loss 1.{seed}", "steps": 12345, "chosen": [{"shots": 1, "lr": 0.5}]}
    )
    rows = [{"step": step, "loss": 2.0 - step / 9, "lr": 0.1, "tokens_per_s": 100} for step in range(1, 9)]
    read = [{"worker": 0, "steps": 8, "bytes": 99}]
    write_jsonl(folder / "metrics.jsonl", [{"step": 0, "val_loss": 2.0, "data_read": read}, *rows])
    rejected = [{"id": i, "reason": f"why & {i}", "output": "long " * 99} for i in range(60)]
    write_jsonl(folder / "rejected.jsonl", rejected)
    return folder


def test_a_report_tells_all_that_the_run_left_and_fetches_nothing(tmp_path: Path) -> None:
    page = Reader(write_report(a_run(tmp_path, "one")))
    assert page.titles == [
        "chosen", "result", "loss", "learning rate", "tokens per second", "rejected", "settings", "versions",
    ]  # fmt: skip
    assert {"12,345", "why & 49", "<b>bold</b>", "0.5"} <= set(page.cells)
    assert "why & 50" not in page.cells
    assert max(map(len, page.cells)) < 400, "a long record is cut"
    assert page.fetched == []


def test_a_report_tells_what_was_typed_and_on_which_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/rayjobs", "adapter-train", "data.path=[a b]"])
    text = write_report(a_run(tmp_path, "one")).read_text()
    assert "python -m rayjobs adapter-train &#39;data.path=[a b]&#39;" in text
    assert f"{os.cpu_count()} × " in text
    assert read_json(tmp_path / "one" / "hardware.json")["CPU"] in text
    monkeypatch.setattr(sys, "argv", ["/somewhere/ipykernel_launcher.py", "-f", "kernel.json"])
    assert read_record(a_run(tmp_path, "two")).command == "", "nothing was typed"


def scored(folder: Path, accuracies: dict[str, dict[int, float]], zero_shot: float = 0.5) -> Path:
    """What cafo-eval leaves: its table, and a row per method, K and seed."""
    names = {k: "1 shot" if k == 1 else f"{k} shots" for cells in accuracies.values() for k in cells}
    cells = {m: {names[k]: f"{100 * a:.1f} ± 1.0 [9, 99]" for k, a in row.items()} for m, row in accuracies.items()}
    cells["CLIP zero-shot"] = dict.fromkeys(names.values(), f"{100 * zero_shot:.2f}")
    write_json(folder / "test" / "result.json", {"headline": "good", "tables": {"pets": cells}, "images": 97})
    first = {"target": "pets", "method": "CLIP zero-shot", "shots": None, "seed": None, "images": 97}
    rows = [{**first, "accuracy": zero_shot}]
    for method, row in accuracies.items():
        for k, accuracy in row.items():
            rows += [
                {**rows[0], "method": method, "shots": k, "seed": s, "accuracy": accuracy + s / 100} for s in (0, 1)
            ]
    write_parquet(folder / "test" / "accuracy.parquet", pa.Table.from_pylist(rows))
    return folder


def test_a_report_may_open_with_a_paragraph_and_holds_the_reports_of_its_steps(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    a_run(a_run(folder, "first"), "inner")
    a_run(folder, "other")
    steps = [{"step": "the first", "report": "first/report.html"}, {"step": "gone", "report": "gone/report.html"}]
    result = {"headline": "done", "about": "What <this> is."}
    write_json(folder / "result.json", {**result, "reports of the steps": steps})
    page = Reader(write_report(folder))
    assert page.fetched == [], "it can be sent as it is"
    assert "result" not in page.titles[: page.titles.index("the first")]
    summaries = [title for title in page.titles if title not in ("settings", "versions")]
    assert summaries.count("the first") == summaries.count("inner") == 1, "a step's own steps too"
    assert not {"other", "gone"} & set(summaries), "only steps that are named and there"
    text = (folder / "report.html").read_text()
    assert '<p class="about">What &lt;this&gt; is.</p>' in text
    assert text.count("loss 1.3") == 2 * 2, "the headlines of both, in the lists of steps and above their own pages"
    write_json(folder / "result.json", result)
    assert {"first", "other"} <= set(Reader(write_report(folder)).titles), "else all runs inside"


def test_runs_side_by_side(tmp_path: Path) -> None:
    folders = [a_run(tmp_path, "one"), a_run(tmp_path, "two", seed=4)]
    scored(folders[0], {"CaFo": {1: 0.6, 16: 0.7}, "CLIP cache": {1: 0.55, 16: 0.65}})
    scored(folders[1], {"CaFo": {1: 0.61, 4: 0.66}})
    page = Reader(compare(folders, tmp_path / "both.html"))
    assert {"seed", "run.name"} <= set(page.cells)
    assert "note" not in page.cells, "only settings that differ"
    assert page.titles[:3] == ["runs", "pets: test accuracy, %", "chosen"]
    table = page.rows[page.rows.index(["method", "run", "1 shot", "4 shots", "16 shots"]) :][1:]

    def accuracy(percent: int) -> str:
        return f"{percent}.0 ± 1.0 [9, 99]".replace(" ± ", "\u00a0±\u00a0").replace(", ", ",\u00a0")

    assert table[:3] == [
        ["CaFo", "one", accuracy(60), "", accuracy(70)],
        ["", "two", accuracy(61), accuracy(66), ""],
        ["CLIP cache", "one", accuracy(55), "", accuracy(65)],
    ]
    assert ["1", "all", "0.5"] in page.rows, "what is the same in all is said once"
    assert not [cell for cell in page.cells if cell.startswith(("[", "{"))], "no raw JSON"
    assert ["images", "97", "97"] in page.rows
    text = (tmp_path / "both.html").read_text()
    for label in ("one, training", "two, validation", "CaFo, one", "CaFo, two", ">CLIP zero-shot<"):
        assert label in text
    assert "Points are means over 2 seeds" in text
    assert "Wilson" in text


def test_plots_of_the_best_choice_stand_open_and_the_others_are_folded(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    kinds = ("landscape", "classes", "confusion", "sources")
    for number, method in enumerate(["… + generated", "CLIP cache"]):
        for kind in kinds:
            drawing = plots.confusion(["$5 to $10", "$10"], [[1, 0], [2, 3]])
            group = f"{method}, 16 shots, seed 1"
            save_plot(folder / "test" / f"{kind}-{number}.png", kind, drawing, group=group, folded=number > 0)
    levels = {"CLIP zero-shot (templates)": 50.0, "CLIP zero-shot (file)": 51.0}
    drawing = plots.accuracy_over_shots({"": plots.Accuracies({"CaFo": {1: [60.0, 61.0]}}, levels, 97)})
    save_plot(folder / "test" / "shots-pets.png", "accuracy over shots, pets's test", drawing)
    page = Reader(write_report(folder))
    best = [f"… + generated, 16 shots, seed 1: {kind}" for kind in kinds]
    at = page.titles.index("accuracy over shots, pets's test")
    assert page.titles[at - 4 : at] == best
    assert page.titles[at + 1 : at + 6] == ["CLIP cache, 16 shots, seed 1", *kinds]
    text = (folder / "report.html").read_text()
    assert text.count("<details>") == 1 + 2, "one method, settings, versions"
    assert text.count(">$5 to $10<") == 2 * 4 * 2, "names on both axes, as they are and no formulas"
    assert "6 test images by true and predicted class. Most often wrong: $5 to $10 for $10, 2 of 5." in text


def test_zero_shot_lines_can_be_told_apart() -> None:
    accuracies = plots.Accuracies({"CaFo": {1: [60.0]}}, {"templates": 50.0, "file": 51.0}, 97)
    drawn = figure_svg(plots.accuracy_over_shots({"": accuracies}).figure, "shots")
    assert len({line for line in drawn.split('"') if "stroke-dasharray" in line and "--grey" in line}) == 2


def test_no_heading_stands_above_nothing(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    write_examples(folder, [(tmp_path / "none.png", "a cat")], "Some.")
    write_jsonl(folder / "rejected.jsonl", [])
    assert not {"examples", "rejected"} & set(Reader(write_report(folder)).titles)


def test_class_descriptions_and_rejected_test_images_are_shown(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    write_json(folder / "prompts.json", {"cat": ["It purrs.", "It sleeps."]})
    write_jsonl(folder / "test" / "rejected.jsonl", [{"role": "pets", "path": "c.png", "reason": "cannot be decoded"}])
    page = Reader(write_report(folder))
    assert "class descriptions" in page.titles
    assert ["cat", "It purrs.\nIt sleeps."] in page.rows
    assert ["pets", "c.png", "cannot be decoded"] in page.rows


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (ValueError("no\nway"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_records_how_it_ended(tmp_path: Path, error: BaseException | None, state: str) -> None:
    @job
    def run(settings: Config) -> dict:
        open_run(settings.run, settings)
        assert read_record(settings.run.folder).now().state == "running"
        if error:
            raise error
        return {}

    settings = Config(run=RunConfig(name="r", storage=str(tmp_path)))
    if error:
        with pytest.raises(type(error)):
            run(settings)
    else:
        run(settings)
    record = read_record(tmp_path / "r")
    assert record.state == state
    assert record.error == ("no" if state == "failed" else "")
    text = (tmp_path / "r" / "report.html").read_text()
    assert f"<span>{state}</span>" in text
    assert ('<p class="failure">no</p>' in text) == (state == "failed")
    assert ('<p class="failure">' in text) == (state != "done"), "the reason first"


def test_an_old_result_does_not_stand_for_a_run_that_failed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun(settings: Config) -> dict:
        write_json(open_run(settings.run, settings) / "result.json", {"headline": "good"})
        return {}

    def fails(settings: Config) -> dict:
        assert not (open_run(settings.run, settings) / "report.html").exists(), "it would tell that the run is done"
        raise ValueError("no memory")

    settings = Config(run=RunConfig(name="r", storage=str(tmp_path)))
    job(begun)(settings)
    monkeypatch.setattr("rayjobs.reporting.report.READERS", [None])  # a report that cannot be made hides no error
    with pytest.raises(ValueError, match="no memory"):
        job(fails)(settings)
    assert not (tmp_path / "r" / "report.html").exists()
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[4] == "no memory"


def test_a_job_within_anothers_run_is_a_part_of_it(tmp_path: Path) -> None:
    ours = RunConfig(name="r", storage=str(tmp_path))

    @config
    class Inner:
        JOB: ClassVar = "inner"
        run: RunConfig

    seen: list[Any] = []

    @job
    def inner(settings: Inner) -> dict:
        folder = open_run(settings.run, settings)
        seen.append((folder / "config.yaml").read_text())
        return {}

    @job
    def outer(settings: Config) -> dict:
        open_run(settings.run, settings)
        inner(Inner(run=ours))
        seen.append(read_record(settings.run.folder))
        return {}

    outer(Config(run=ours))
    assert "seed: 3" in seen[0]
    assert (seen[1].job, seen[1].state) == ("test-report", "running"), "the inner one's end is not the run's"
    assert read_record(tmp_path / "r").state == "done"
    inner(Inner(run=ours))
    assert read_record(tmp_path / "r").job == "inner", "alone, it is a run as any other"


def test_settings_refused_before_a_run_began_leave_no_trace(tmp_path: Path) -> None:
    @job
    def run(settings: Config) -> dict:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        run(Config(run=RunConfig(name="r", storage=str(tmp_path))))
    assert not (tmp_path / "r").exists()


def test_a_driver_that_is_gone_was_cut_off(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = json.loads((folder / RECORD_FILE).read_text())
    write_json(folder / RECORD_FILE, {**record, "pid": gone.pid})
    assert read_record(folder).now().state == "cut off"
    write_json(folder / RECORD_FILE, {**record, "pid_since": record["pid_since"] - 60})
    assert read_record(folder).now().state == "cut off", "another process has its pid by now"
    write_json(folder / RECORD_FILE, record)
    assert read_record(folder).now().state == "running"


def test_the_command_line_lists_runs_and_writes_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path, "one")
    inner = a_run(one, "inner")
    assert set(find_runs(tmp_path)) == {one, inner}
    assert main(["runs", str(tmp_path)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [[line[0], line[4]] for line in lines] == [["one/inner", "loss 1.3"], ["one", "loss 1.3"]]
    assert main(["report", str(one)]) == 0
    assert (one / "report.html").exists()
    assert main(["report", str(one), str(inner), "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 2


def test_one_odd_record_does_not_end_the_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path, "a" * 90)
    for name, text in {"cut": '{"job": "x"', "other": "[]", "older": '{"job": "x", "started": 3}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD_FILE).write_text(text)
    assert main(["runs", str(tmp_path)]) == 0
    terminal = capsys.readouterr()
    assert terminal.out.startswith("a" * 90 + "\t")
    assert terminal.out.count("\n") == 1
    assert all(str(tmp_path / name / RECORD_FILE) in terminal.err for name in ("cut", "other", "older"))
    assert main(["report", str(tmp_path / "cut")]) == 2
    assert f"{tmp_path / 'cut' / RECORD_FILE}: malformed JSON" in capsys.readouterr().err


ODD_NAMES = ("a b", "[bold]x", "50%20 #1?", "_first", "Größe 犬")


def test_odd_names_of_folders_are_shown_and_linked_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "all [runs] 100%"
    folders = []
    for number, name in enumerate(ODD_NAMES):
        a_run(storage, f"run{number}", seed=number).rename(storage / name)
        folders.append(storage / name)
    write_json(folders[0] / "result.json", {"headline": "tab\there\nand there"})
    assert main(["runs", str(storage)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} == set(ODD_NAMES)
    assert "tab here and there" in [line[4] for line in lines]
    for folder in folders:
        assert main(["report", str(folder)]) == 0
    out = tmp_path / "c [1] %.html"
    assert main(["report", *map(str, folders[:4]), "--out", str(out)]) == 0
    text = out.read_text()
    assert all(f"{name}, training" in text for name in ("a b", "[bold]x", "50%20 #1?", "_first"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", "{"),
        ("result.json", "[1]"),
        ("result.json", '{"tables": 3, "headline": null}'),
        ("test/result.json", '{"tables": {"pets": [1]}}'),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("metrics.jsonl", '{"step": "1", "loss": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": [1]}\n'),
        ("metrics.jsonl", "\xff{\n\n"),
        ("config.yaml", "a: [\n"),
        ("config.yaml", "3"),
        ("figures.json", '[{"name": "x"}]'),
        ("figures.json", '[{"file": "gone.svg", "title": "x"}]'),
        ("examples.json", '{"images": [{"file": "gone.jpg", "caption": "x"}], "note": ""}'),
        ("trials/a/trial.json", "{}"),
        ("prompts.json", '{"cat": 3}'),
        ("rejected.jsonl", "3\n"),
        ("versions.json", "[]"),
        ("hardware.json", "[]"),
        ("test/accuracy.parquet", "PAR1"),
        ("unknown.json", "{"),
    ],
)
def test_a_damaged_file_costs_its_own_section(
    tmp_path: Path, file: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = a_run(tmp_path, "one"), a_run(tmp_path, "two", seed=4)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(content, encoding="latin-1")
    assert main(["report", str(folder)]) == 0
    assert main(["report", str(folder), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert main(["runs", str(tmp_path)]) == 0
    terminal = capsys.readouterr().err
    assert "Traceback" not in terminal
    assert "settings" in Reader(folder / "report.html").titles or file == "config.yaml"
    harmless = ("unknown.json", "test/accuracy.parquet")
    if "tables" not in content or file.startswith("test"):
        assert ("could not be read" in Reader(folder / "report.html").titles) == (file not in harmless)
        assert (f"{folder}" in terminal) == ("left out" in terminal) == (file != "unknown.json")


def test_plots_of_an_earlier_release_are_shown_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    for name in ("b", "a", "c"):
        save_plot(folder / "test" / f"{name}.png", f"plot <{name}>", plots.confusion(["x", "y"], [[1, 0], [0, 1]]))
    (folder / "test" / "figures.json").unlink()
    (folder / "test" / "c.svg").write_text("<svg></svg>")
    titles = Reader(write_report(folder)).titles
    at = titles.index("plot <a>")
    assert titles[at : at + 3] == ["plot <a>", "plot <b>", "c"]
