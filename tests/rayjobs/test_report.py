"""Reports and records of runs: made from a run's files alone, whole in one page, true about how a run ended."""

import json
import subprocess
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rayjobs.__main__ import main
from rayjobs.config import config
from rayjobs.report import compare, write_report
from rayjobs.runs import RECORD, find_runs, read_record, recorded
from rayjobs.runtime import RunConfig, open_run
from rayjobs.tables import write_json, write_jsonl


@config
class Config:
    seed: int = 3
    note: str = "<b>bold</b>"
    run: RunConfig


class Reader(HTMLParser):
    """Text by tag, and whatever a page would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.titles: list[str] = []
        self.fetched: list[str] = []
        self.tag = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tag = tag
        self.fetched += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""

    def handle_data(self, data: str) -> None:
        if self.tag == "td":
            self.cells[-1] += data
        elif self.tag in ("h2", "summary") and data.strip():
            self.titles.append(data.strip())


def a_run(storage: Path, name: str, seed: int = 3) -> Path:
    folder = open_run(RunConfig(name=name, storage=str(storage)), Config(seed=seed, run=RunConfig(name=name)))
    write_json(
        folder / "result.json", {"headline": f"loss 1.{seed}", "steps": 12345, "chosen": [{"shots": 1, "lr": 0.5}]}
    )
    rows = [{"step": step, "loss": 2.0 - step / 9, "lr": 0.1, "tokens_per_s": 100} for step in range(1, 9)]
    write_jsonl(folder / "metrics.jsonl", [{"step": 0, "val_loss": 2.0}, *rows])
    write_jsonl(folder / "rejected.jsonl", [{"id": i, "reason": f"why & {i}"} for i in range(60)])
    return folder


def test_a_report_tells_all_that_the_run_left_and_fetches_nothing(tmp_path: Path) -> None:
    page = Reader(write_report(a_run(tmp_path, "one")))
    assert page.titles == [
        "result", "chosen", "loss", "learning rate", "tokens per second", "rejected", "settings", "versions",
    ]  # fmt: skip
    assert {"12,345", "why & 49", "<b>bold</b>", "0.5"} <= set(page.cells)
    assert "why & 50" not in page.cells
    assert page.fetched == []


def test_runs_side_by_side(tmp_path: Path) -> None:
    folders = [a_run(tmp_path, "one"), a_run(tmp_path, "two", seed=4)]
    page = Reader(compare(folders, tmp_path / "both.html"))
    assert {"seed", "run.name", "loss 1.3", "loss 1.4"} <= set(page.cells)
    assert "note" not in page.cells, "only settings that differ"
    text = (tmp_path / "both.html").read_text()
    assert "one loss in training" in text
    assert "two loss on validation" in text


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (ValueError("no\nway"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_records_how_it_ended(tmp_path: Path, error: BaseException | None, state: str) -> None:
    @recorded
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
    assert (tmp_path / "r" / "report.html").exists() == (state == "done")


def test_settings_refused_before_a_run_began_leave_no_trace(tmp_path: Path) -> None:
    @recorded
    def run(settings: Config) -> dict:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        run(Config(run=RunConfig(name="r", storage=str(tmp_path))))
    assert not (tmp_path / "r").exists()


def test_a_driver_that_is_gone_was_cut_off(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = json.loads((folder / RECORD).read_text())
    write_json(folder / RECORD, {**record, "pid": gone.pid})
    assert read_record(folder).now().state == "cut off"


def test_a_run_has_one_driver_at_a_time(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one")
    record = json.loads((folder / RECORD).read_text())
    with subprocess.Popen(["sleep", "60"]) as other:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(folder / RECORD, {**record, "pid": other.pid, "started": now})
        with pytest.raises(ValueError, match=f"one is being run by process {other.pid} of "):
            a_run(tmp_path, "one")
        for harmless in ({"state": "interrupted"}, {"host": "elsewhere"}, {"started": "2026-01-01T00:00:00+00:00"}):
            write_json(folder / RECORD, {**record, "pid": other.pid, "started": now, **harmless})
            a_run(tmp_path, "one")
        write_json(folder / RECORD, {**record, "pid": other.pid, "started": now})
        other.kill()
    a_run(tmp_path, "one")


def test_the_command_line_lists_runs_and_writes_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path, "one")
    inner = a_run(one, "inner")
    assert set(find_runs(tmp_path)) == {one, inner}
    assert main(["runs", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "one/inner" in listed
    assert "loss 1.3" in listed
    assert main(["report", str(one)]) == 0
    assert (one / "report.html").exists()
    assert main(["report", str(one), str(inner), "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 2
