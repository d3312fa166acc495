"""Answered records as questions with a reference, and the table of their answers.

The last answer of a record is its reference; what stands before it is asked.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from adapter.templates import Template
from adapter.tokenizers.base import Tokenizer
from rayjobs.data.trained_records import record_digest
from rayjobs.errors import DataError
from rayjobs.inference.answer_metrics import METRICS, AnswerScorer, describe_metrics, mean_scores, metric_rows
from rayjobs.inference.batch import Record
from rayjobs.inference.instruction_file import describe_error
from rayjobs.inference.instructions import evenly_spaced

ANSWERS_FILE = "answers.parquet"
"""The answers in the folder of a run."""

ANSWERED = pa.schema(
    [
        ("record", pa.string()),  # the identity of the question with its reference, equal in all runs
        ("question", pa.string()),
        ("reference", pa.string()),
        ("answer", pa.string()),  # null if there is none
        ("error", pa.string()),  # why there is none
        ("exact_match", pa.float64()),  # in percent, as the others
        ("rouge_l", pa.float64()),
        ("chrf", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record without its last answer."""

    record: Record
    """what is asked; empty if it cannot be"""
    identity: str
    """of the whole record, its content in hexadecimal"""
    reference: str
    """the last answer"""
    place: str
    """of the record in its file, if it was set aside while it was read"""
    error: str = ""
    """why it cannot be asked"""

    @property
    def text(self) -> str:
        """The question as a person reads it: the instruction and its input, the last turn, or the prompt."""
        if messages := self.record.get("messages"):
            return str(messages[-1]["content"])
        parts = (self.record.get(name) for name in ("prompt", "instruction", "input"))
        return "\n".join(filter(None, parts))


def read_questions(
    records: Iterable[Record], template: Template, tokenizer: Tokenizer, window: int
) -> Iterator[Question]:
    """The question of each record; one that cannot be asked in the template has an error.

    records: as `Source.read` yields them.
    """
    for record in records:
        if "rejected" in record:
            yield Question(record={}, identity="", reference="", place=record["place"], error=record["rejected"])
            continue
        asked, reference, error = _split(record)
        error = error or describe_error(asked, template, tokenizer, window)
        identity = f"{record_digest(record) % 2**64:016x}"
        yield Question(record=asked, identity=identity, reference=reference, place=record.get("place", ""), error=error)


def _split(record: Record) -> tuple[Record, str, str]:
    """The record without its last answer, that answer, and why there is none."""
    if "messages" in record:
        *before, last = record["messages"]
        error = "" if last["role"] == "assistant" and last["content"] else "it does not end with an answer in words"
        return {**record, "messages": before}, last["content"] or "", error
    key = next((name for name in ("completion", "output") if name in record), None)
    if key is None:
        return {}, "", "it is a plain text, which holds nothing to answer"
    return {name: value for name, value in record.items() if name != key}, record[key], ""


def usable(questions: Iterable[Question]) -> list[Record]:
    """The records of the questions that can be asked."""
    return [question.record for question in questions if not question.error]


def answered_rows(questions: Sequence[Question], answers: Sequence[Record], scorer: AnswerScorer) -> list[Record]:
    """A row of `ANSWERED` for each question. answers: of those without an error, rows of `instructions.ANSWERS`."""
    remaining, rows = iter(answers), []
    for question in questions:
        found: dict[str, Any] = {} if question.error else next(remaining)
        error = question.error or found["image_error"]
        answer = None if error else found["answer"]
        scores = {} if answer is None else scorer.score(answer, question.reference)
        texts = {"record": question.identity, "question": question.text, "reference": question.reference}
        rows.append({**texts, "answer": answer, "error": error or None, **scores})
    return rows


def summarize_answers(rows: Sequence[Record], scorer: AnswerScorer) -> dict[str, Any]:
    """The result of an evaluation: each metric with its interval, and some of the answers.

    rows: of `ANSWERED`. Raises DataError if none has an answer.
    """
    answered = [row for row in rows if row["error"] is None]
    if not answered:
        raise DataError("no record could be answered; rejected.jsonl says why")
    table = metric_rows(answered)
    answers, references = ([row[name] for row in answered] for name in ("answer", "reference"))
    shown = ("question", "reference", "answer", *METRICS)
    return {
        "headline": f"{describe_metrics(table)} of {len(answered):,} answers",
        "answers": len(answered),
        "rejected_records": len(rows) - len(answered),
        **mean_scores(answered),
        "corpus_chrf": round(scorer.corpus_chrf(answers, references), 4),
        "chrf_signature": scorer.chrf_signature,
        "metrics": table,
        "some_answers": [_cells({name: row[name] for name in shown}) for row in evenly_spaced(answered)],
    }


def _cells(row: Record) -> Record:
    return {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in row.items()}


def rejected_questions(rows: Sequence[Record], questions: Sequence[Question]) -> list[dict[str, str]]:
    """{record, question, reason} of the rows without an answer."""
    return [
        {"record": question.place or row["record"], "question": row["question"][:200], "reason": row["error"]}
        for row, question in zip(rows, questions, strict=True)
        if row["error"]
    ]
