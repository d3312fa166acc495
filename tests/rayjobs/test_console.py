"""The progress display: a live bar with its table on a terminal, plain lines elsewhere."""

import io
import logging
import pickle

import pytest

from rayjobs import console
from rayjobs.console import Progress, setup_logging, show_result, show_table

TABLE = [["K", "best on val"], ["1", "90.1%"], ["16", "93.4%"]]


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_terminal_shows_the_table_beneath_the_bar(terminal: pytest.CaptureFixture[str]) -> None:
    with Progress("tune", unit="trials", total=4) as bar:
        bar.update(3, "best on val: K=16 93.4%", TABLE)
    shown = terminal.readouterr().err
    assert "3/4" in shown
    assert all(cell in shown for row in TABLE[1:] for cell in row)


def test_a_long_note_is_cut_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, terminal: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with Progress("tiny models", unit="steps", total=1800) as bar:
        bar.update(1690, "DINO loss 4.33, CLIP loss 1.97, LLaMA for questions loss 0.05, LLaMA for notes loss 0.19")
    shown = terminal.readouterr().err
    assert "1690/1800" in shown
    assert "…" in shown


def test_elsewhere_it_is_lines_with_the_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "time", Clock())
    setup_logging()
    with Progress("tune", unit="trials", total=4) as bar:
        bar.update(3, "best on val: K=16 93.4%", TABLE)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune: 3/4 trials in 0 s")
    assert line.endswith("best on val: K=16 93.4%")


def test_pace_counts_neither_the_start_nor_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    setup_logging()
    with Progress("answer", unit="answers", total=9000, done=600) as bar:
        for seconds, done in ((20, 700), (10.5, 721), (10.5, 742), (9, 9000)):
            clock.now += seconds
            bar.update(done)
    assert capsys.readouterr().err.splitlines() == [
        "answer: 700/9000 answers in 20 s",  # no pace can be told of a single update
        "answer: 721/9000 answers in 30 s  2 answers/s, 4140 s left",
        "answer: 742/9000 answers in 41 s  2 answers/s, 4129 s left",
        "answer: 9000/9000 answers in 50 s  277 answers/s",
    ]


def test_a_terminal_shows_the_pace(monkeypatch: pytest.MonkeyPatch, terminal: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("train", unit="steps", total=100) as bar:
        monkeypatch.setattr(console, "time", clock)
        for seconds, done in ((9, 20), (10, 40)):
            clock.now += seconds
            bar.update(done)
    shown = terminal.readouterr().err
    assert "2 steps/s" in shown
    assert "0:00:30" in shown


def test_a_resumed_run_that_goes_back_has_no_negative_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    setup_logging()
    with Progress("train", unit="steps", total=100, done=50) as bar:
        for done in (40, 41, 43):
            clock.now += 11
            bar.update(done)
    assert [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "", "", "0.182 steps/s, 314 s left"
    ]  # fmt: skip


def test_advances_at_one_moment_have_no_pace_and_the_end_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    setup_logging()
    for seconds in (7, 12):
        with Progress("tokenize", unit="records") as bar:
            clock.now += seconds
            for count in (1024, 976):
                clock.now += 1e-4
                bar.advance(count)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "tokenize: 2000 records in 7 s"
    assert others == ["tokenize: 1024 records in 12 s", "tokenize: 2000 records in 12 s"]
    with Progress("tokenize", unit="records") as bar:
        clock.now += 12
        bar.advance(2000)
    assert capsys.readouterr().err == "tokenize: 2000 records in 12 s\n"


def test_messages_and_tables_are_without_terminal_codes_and_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    text = "\x1b[36mray::Worker\x1b[39m\x1b]0;title\x07 http://user:pass@host/a\x00"
    logging.getLogger("rayjobs").error("%s", text)
    show_table("t", ["a"], [[text]])
    captured = capsys.readouterr()
    assert captured.err == "ray::Worker http://***@host/a\n"
    assert "ray::Worker http://***@host/a" in captured.out
    assert "\x1b" not in captured.out


def test_a_display_is_pickled_without_its_terminal(terminal: pytest.CaptureFixture[str]) -> None:
    with Progress("tune", unit="trials", total=4) as bar:
        bar.update(1)
        assert pickle.loads(pickle.dumps(bar)).done == 1


def test_cells_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("[b]title", ["[red]column"], [["runs/[a]/x"]])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[b]title", "[red]column", "runs/[a]/x"))
    show_result("r", {"val_loss": 0.5, "adapter": "runs/[1]", "rows": [{"a": 1}]})
    out = capsys.readouterr().out
    assert "val loss" in out
    assert "runs/[1]" in out
    assert "rows" not in out


def test_messages_go_to_stderr_and_with_verbose_name_their_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("rayjobs.some.module")
    for verbose in ("0", "1"):
        monkeypatch.setenv("RAYJOBS_VERBOSE", verbose)
        setup_logging()
        logger.debug("details")
        logger.warning("100% [full]")
    monkeypatch.setenv("RAYJOBS_VERBOSE", "0")
    setup_logging()
    assert capsys.readouterr() == (
        "", "100% [full]\nrayjobs.some.module: details\nrayjobs.some.module: 100% [full]\n"
    )  # fmt: skip


ACCURACIES = [
    ["CLIP zero-shot (clip, templates)", *["79.1 [75.6, 82.1]"] * 4],
    ["ours", *["93.9 ± 1.7 [91.6, 95.5]"] * 4],
]


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_table_of_figures_is_split_by_columns_where_it_is_too_wide(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_table("test", ["method", "0 shots", "1 shot", "4 shots", "16 shots"], ACCURACIES)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert out.count("93.9 ± 1.7 [91.6, 95.5]") == 4, "no figure is broken"
    assert out.count("method") == {50: 4, 80: 2, 200: 1}[width]
    assert out.count("test\n") + out.count("test ") == 1
    assert "…" not in out


def test_a_table_of_texts_wraps_between_words_or_is_a_block_for_each_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns, words = ["run", "state", "headline"], "a headline of some words " * 4
    show_table("runs", columns, [["digits-of-mine", "done", words]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert " ".join(out.split()).count("headline") == 5
    show_table("answers", ["question", "base", "adapted"], [["x" * 50, "y" * 40, words]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert f"question: {'x' * 50}\n" in out
    assert f"  base      {'y' * 40}" in out, "each value behind its name"


def test_a_live_table_shows_the_columns_that_there_is_room_for_and_a_note_has_its_own_line(
    monkeypatch: pytest.MonkeyPatch, terminal: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    header = ["K", *(f"column {i}" for i in range(12))]
    with Progress("tune", unit="trials", total=4) as bar:
        bar.update(3, "", [header, ["16", *(f"value {i}" for i in range(12))]])
    shown = terminal.readouterr().err
    assert "value 4" in shown
    assert "value 11" not in shown
    assert "…" not in shown
    note = "loss 1.2345  lr 1.00e-03  9,876 tokens/s  val 1.2345"
    with Progress("train", unit="steps", total=1200) as bar:
        bar.update(12, note)
    shown = terminal.readouterr().err
    assert f"  {note}" in shown
    assert "12/1200" in shown


class UnreadOutput(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_table_that_nobody_reads_is_a_broken_pipe_as_a_print_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", UnreadOutput())
    with pytest.raises(BrokenPipeError):
        show_table("title", ["a", "b"], [["1", "2"]])
