"""The progress display: a live bar with its table on a terminal, plain lines elsewhere."""

import io
import sys

import pytest

from rayjobs.runtime import Progress

TABLE = [["K", "best on val"], ["1", "90.1%"], ["16", "93.4%"]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_table_beneath_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress("tune", unit="trials", total=4) as bar:
        bar.update(3, "best on val: K=16 93.4%", TABLE)
    shown = sys.stderr.getvalue()
    assert "3/4" in shown
    assert all(cell in shown for row in TABLE[1:] for cell in row)


def test_elsewhere_it_is_lines_with_the_note(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tune", unit="trials", total=4) as bar:
        bar.update(3, "best on val: K=16 93.4%", TABLE)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune: 3/4 trials in 0 s")
    assert line.endswith("best on val: K=16 93.4%")
