"""adapter-judge: both orders, ties, what a stop loses, and what is refused, against a server on this machine."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cafo.wilson import wilson_interval
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.errors import DataError
from rayjobs.inference.judging import (
    PROMPT,
    Pair,
    Verdict,
    fill_prompt,
    join_verdicts,
    read_verdict,
    summarize_verdicts,
)
from rayjobs.inference.record_answers import ANSWERED, ANSWERS_FILE
from rayjobs.jobs import adapter_judge
from rayjobs.storage.files import read_json, read_jsonl, write_parquet
from tests.cafo.server import serve

pytest.importorskip("openai")


def write_answers(folder: Path, answers: list[str | None]) -> str:
    rows = [
        {"record": f"{n:016x}", "question": f"question {n}", "reference": "r", "answer": answer}
        for n, answer in enumerate(answers)
    ]
    write_parquet(folder / ANSWERS_FILE, pa.Table.from_pylist(rows, ANSWERED))
    return str(folder)


def given(tmp_path: Path, url: str, *more: str) -> list[str]:
    first = write_answers(tmp_path / "tuned", ["good", "good", "same", "bad", "good", None, "odd"])
    second = write_answers(tmp_path / "base", ["bad", "bad", "same", "good", "fair", "good", "bad"])
    named = [f"first={first}", f"second={second}", "run.name=judged", f"run.storage={tmp_path / 'runs'}"]
    judge = [f"endpoint.base_url={url}", "endpoint.model=judge", "endpoint.key_variable=", "endpoint.retries=0"]
    return [*named, *judge, "endpoint.requests_per_minute=60000", *more]


def verdict(text: str) -> str:
    """Prefers `good` to `bad`, the answer that is shown first to `fair`, and says nothing of `odd`."""
    answers = [part.partition("\n")[2].split("\n\n")[0] for part in text.split("[Answer ")[1:]]
    if "odd" in answers:
        return "I cannot say."
    if "fair" in answers:
        return "Not [[B]] but [[A]]"
    return f"It is right. [[{'A' if answers[0] == 'good' else 'b'}]]"


def test_an_answer_wins_if_it_is_preferred_in_both_orders(tmp_path: Path) -> None:
    with serve(answer=verdict) as (url, requests):
        settings = load(adapter_judge.Config, None, given(tmp_path, url))
        adapter_judge.plan(settings)
        assert not requests
        result = adapter_judge.run(settings)
        assert len(requests) == 2 * 5, "equal answers are not asked about"
        assert adapter_judge.run(settings) == result
        assert len(requests) == 2 * 5
    assert requests[0]["temperature"] == 0
    assert [result[name] for name in ("wins", "ties", "losses", "equal_answers", "unreadable")] == [2, 2, 1, 1, 1]
    assert result["win_rate"] == 3 / 5
    low, high = wilson_interval(3 / 5, 5)
    assert (result["win_rate_low"], result["win_rate_high"]) == pytest.approx((low, high), abs=1e-4)
    assert (result["same_in_both_orders"], result["first_place_preferred"]) == (0.75, 5 / 8)
    assert result["headline"].startswith("tuned wins 60.0% [")
    rows = read_jsonl(settings.run.folder / "verdicts.jsonl")
    assert [row["outcome"] for row in rows] == ["first", "first", "tie", "second", "tie", "unreadable"]
    assert "good" in (settings.run.folder / "report.html").read_text()


def test_a_stop_keeps_the_verdicts_and_other_answers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(answer=verdict) as (url, requests):
        words = given(tmp_path, url)
        settings = load(adapter_judge.Config, None, words)

        def stop(text: str) -> str:
            if "question 3" in text:
                raise KeyboardInterrupt
            return verdict(text)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter_judge.EndpointJudge, "__call__", lambda self, text: stop(text))
            with pytest.raises(KeyboardInterrupt):
                adapter_judge.run(settings)
        assert len(read_jsonl(settings.run.folder / "verdicts.jsonl")) == 3
        adapter_judge.run(settings)
        assert len(requests) == 2 * 3
        write_answers(tmp_path / "base", ["bad", "other"])
        assert main(["adapter-judge", *words]) == 2
        assert "holds results of other settings (pairs was" in capsys.readouterr().err
    with serve(fail_first=99) as (url, _):
        assert main(["adapter-judge", *given(tmp_path, url, "run.name=refused")]) == 2
        told = capsys.readouterr().err
        assert "judge at http://127.0.0.1" in told
        assert "Traceback" not in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["first=FOLDER/none"], "no such file; give the folder of a run of adapter-eval"),
        (["prompt=FOLDER/prompt.txt"], "the prompt lacks {first}, {second}"),
        (["second=FOLDER/others"], "answered no question in common"),
        (["endpoint.key_variable=NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path: Path, more: list[str], message: str) -> None:
    (tmp_path / "prompt.txt").write_text("Which is better for {question}?")
    write_answers(tmp_path / "others", [None] * 7)
    words = given(tmp_path, "http://127.0.0.1:9/v1", *[word.replace("FOLDER", str(tmp_path)) for word in more])
    with pytest.raises(ValueError, match=message):
        adapter_judge.run(load(adapter_judge.Config, None, words))
    assert not (tmp_path / "runs").exists()


def test_verdicts_are_read_and_joined() -> None:
    assert [read_verdict(text) for text in ("[[A]]", "x [[ b ]].", "[[TIE]]", "[[c]]", "A", "[[A]] [[B]]")] == [
        "A", "B", "tie", "tie", None, "B",
    ]  # fmt: skip
    labels = ("A", "B", "tie", None)
    outcomes = {(a, b): join_verdicts(a, b) for a in labels for b in labels}
    assert outcomes.pop(("A", "B")) == "first"
    assert outcomes.pop(("B", "A")) == "second"
    assert {outcome for pair, outcome in outcomes.items() if None in pair} == {"unreadable"}
    assert {outcome for pair, outcome in outcomes.items() if None not in pair} == {"tie"}
    pair = Pair("1", "{first}", "r", "{second}", "b")
    asked = [fill_prompt("{question}|{first}|{second}|{reference}", pair, swapped=swapped) for swapped in (False, True)]
    assert asked == ["{first}|{second}|b|r", "{first}|b|{second}|r"], "braces in texts are no fields"
    assert "[[tie]]" in fill_prompt(PROMPT, pair, swapped=False)
    with pytest.raises(DataError, match="no reply to 1 pairs has a verdict"):
        summarize_verdicts([Verdict(record="1", outcome="unreadable", replies=("", ""))])


def test_a_verdict_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with serve(answer=verdict) as (url, _):
        settings: Any = load(adapter_judge.Config, None, given(tmp_path, url))
        adapter_judge.run(settings)
        (settings.run.folder / "verdicts.jsonl").write_text('{"a": 1}\n')
        with pytest.raises(DataError, match="not a verdict"):
            adapter_judge.run(settings)
    assert read_json(settings.run.folder / "run.json")["state"] == "failed"
