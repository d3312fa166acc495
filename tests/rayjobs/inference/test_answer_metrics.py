"""Metrics of answers against their equations in naive loops, and records as questions."""

from collections import Counter
from pathlib import Path

import pytest

from adapter import AdaptedModel
from adapter.templates import ALPACA, PLAIN
from rayjobs.errors import DataError
from rayjobs.inference.answer_metrics import AnswerScorer, describe_metrics, metric_rows
from rayjobs.inference.record_answers import (
    answered_rows,
    read_questions,
    rejected_questions,
    summarize_answers,
    usable,
)
from tests.conftest import WORDS

pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")

PAIRS = [
    ("the cat sat on the mat", "the cat sat under the mat"),
    ("the big red cat", "a red dog and the cat ran"),
    ("seven", "seven"),
    ("", "the dog"),
    ("bird", "hill"),
    ("ran ran ran", "ran"),
]


def rouge_l(answer: list[str], reference: list[str]) -> float:
    """The F-measure of the longest common subsequence, by its recursion over prefixes."""
    longest = [[0] * (len(reference) + 1) for _ in range(len(answer) + 1)]
    for i, word in enumerate(answer):
        for j, other in enumerate(reference):
            longest[i + 1][j + 1] = longest[i][j] + 1 if word == other else max(longest[i][j + 1], longest[i + 1][j])
    common = longest[-1][-1]
    return 200 * common / (len(answer) + len(reference)) if common else 0.0


def character_ngrams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def chrf(answer: str, reference: str) -> float:
    """The mean over n of 1 to 6 of precision and recall of character n-grams, then their F-measure with beta 2."""
    precisions, recalls = [], []
    for n in range(1, 7):
        a, r = (character_ngrams(text, n) for text in (answer, reference))
        if a and r:
            matches = sum((a & r).values())
            precisions.append(matches / sum(a.values()))
            recalls.append(matches / sum(r.values()))
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_scores_are_those_of_their_equations() -> None:
    scorer = AnswerScorer()
    for answer, reference in PAIRS:
        scores = scorer.score(f" {answer}\n", reference)
        assert scores["exact_match"] == 100.0 * (answer == reference)
        assert scores["rouge_l"] == pytest.approx(rouge_l(answer.split(), reference.split()))
        assert scores["chrf"] == pytest.approx(chrf(answer, reference), abs=1e-6), (answer, reference)
    assert "version:" in scorer.chrf_signature


def test_means_have_intervals() -> None:
    scores = [{"exact_match": 100.0 * (n < 3), "rouge_l": 10.0 * n, "chrf": 50.0} for n in range(10)]
    exact, rouge, same = metric_rows(scores)
    assert exact == {"metric": "exact match", "mean, %": "30", "95% interval": "[11, 60]"}  # Wilson's of 3 in 10
    assert rouge == {"metric": "ROUGE-L", "mean, %": "45", "95% interval": "[26, 64]"}  # 45 ± 1.96 · 30.28 / √10
    assert same["95% interval"] == "[50.00, 50.00]"
    assert describe_metrics([exact, rouge]) == "exact match 30 [11, 60], ROUGE-L 45 [26, 64]"
    assert metric_rows(scores[:1])[0]["95% interval"] == ""


def test_the_last_answer_of_a_record_is_its_reference(tiny_base: Path) -> None:
    pieces = AdaptedModel.from_pretrained(tiny_base).tokenizer
    chat = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"}]
    call = [*chat, {"role": "user", "content": "on"}, {"role": "assistant", "content": None, "tool_calls": []}]
    records = [
        {"instruction": "the", "input": "cat", "output": "sat", "image": ""},
        {"prompt": "the dog", "completion": " ran", "image": ""},
        {"messages": [*chat, {"role": "user", "content": "on?"}, {"role": "assistant", "content": "mat"}], "image": ""},
        {"messages": call, "image": ""},
        {"text": "the", "image": ""},
        {"place": "line 7", "rejected": "no output"},
        {"instruction": " ".join(WORDS * 80), "input": "", "output": "sat", "image": ""},
    ]
    questions = list(read_questions(records, ALPACA, pieces, 1024))
    assert [(one.text, one.reference) for one in questions[:3]] == [
        ("the\ncat", "sat"),
        ("the dog", " ran"),
        ("on?", "mat"),
    ]
    assert all("output" not in record and "completion" not in record for record in usable(questions))
    assert [len(record.get("messages", [])) for record in usable(questions)] == [0, 0, 3]
    assert questions[0].identity == next(read_questions(records, PLAIN, pieces, 1024)).identity
    answers = [
        {"answer": "sat", "image_error": ""},
        {"answer": None, "image_error": "gone"},
        {"answer": "a", "image_error": ""},
    ]
    rows = answered_rows(questions, answers, AnswerScorer())
    assert [row["answer"] for row in rows] == ["sat", None, "a", None, None, None, None]
    assert [row["exact_match"] for row in (rows[0], rows[2])] == [100, 0]
    reasons = {one["record"]: one["reason"] for one in rejected_questions(rows, questions)}
    assert len(reasons) == 5
    assert reasons["line 7"] == "no output"
    told = " ".join(reasons.values())
    assert all(part in told for part in ("gone", "does not end with an answer", "a plain text", "leaves no room"))
    result = summarize_answers(rows, AnswerScorer())
    assert (result["answers"], result["rejected_records"], result["exact_match"]) == (2, 5, 50.0)
    with pytest.raises(DataError, match="no record could be answered"):
        summarize_answers(rows[3:], AnswerScorer())
