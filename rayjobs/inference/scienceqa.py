"""Evaluate on ScienceQA: generate every problem's answer, or score its options by likelihood; then the paper's table.

Decoding is greedy. An answer is read out of the generated text; a text that names no option counts as wrong.

Options are scored by the likelihood of `The answer is (B).`, or by that of each option's own text, which is divided by
the text's bytes in UTF-8, because a longer text is less likely whatever it says (`acc_norm` of lm-evaluation-harness,
which leaves out the end token that is counted here).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from adapter.errors import RecordError
from adapter.generation_config import GenerationConfig
from adapter.model import AdaptedModel
from adapter.records.encoding import encode_record
from adapter.records.example import Example
from adapter.records.scienceqa import AVERAGE, CLASSES, LETTERS, Problem, Row, read_answer, tabulate
from adapter.templates import Template
from rayjobs.inference.batch import Record
from rayjobs.inference.decoding import Reading
from rayjobs.reporting.example_gallery import ORDER, mistakes_first
from rayjobs.reporting.tables import accuracy_cell, markdown_table, write_csv
from rayjobs.storage.files import write_text

MAX_ANSWER_TOKENS = 32
"""Maximum number of generated tokens; `The answer is (A).` has about eight."""

PREDICTIONS = pa.schema(
    [
        ("pid", pa.string()),
        ("text", pa.string()),  # the generated text; empty if options were scored
        ("predicted", pa.string()),  # the option's letter; null if the text names none, or the best options are tied
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("log_likelihoods", pa.list_(pa.float64())),  # of every option's answer or text, if options were scored
        ("error", pa.string()),  # why the problem could not be put to the model
        ("shortened", pa.bool_()),  # whether its context lost its beginning to fit into the window
        ("image_error", pa.string()),  # why its image could not be read; it was then answered without
    ]
)


@dataclass(frozen=True)
class AnswerProblems:
    """A `GenerationTask`: predicts the answers of a chunk of problem records."""

    template: Template
    reading: Reading
    max_length: int
    """tokens of a prompt with its answer"""

    def __call__(self, model: AdaptedModel, records: list[Record], images: list[Tensor | None]) -> list[Record]:
        """A row of `PREDICTIONS` for each problem."""
        window = min(model.model.config.max_seq_len, self.max_length)
        prompt_window = window - MAX_ANSWER_TOKENS if self.reading == "generate" else window
        encoded = [self._encode(record, model, prompt_window) for record in records]
        examples = [example for of_problem, _ in encoded for example in of_problem]
        example_images = [image for image, (of_problem, _) in zip(images, encoded, strict=True) for _ in of_problem]
        outputs: Iterator[Any]
        if self.reading == "generate":
            asked = [
                {**record, "input": example.input}
                for record, (of_problem, _) in zip(records, encoded, strict=True)
                for example in of_problem
            ]
            decoding = GenerationConfig(max_new_tokens=MAX_ANSWER_TOKENS, temperature=0)
            outputs = iter(model.answer_records(asked, decoding, images=example_images, template=self.template))
        else:
            outputs = iter(model.losses(examples, images=example_images))
        return [
            self._prediction(record, of_problem, [next(outputs) for _ in of_problem], error)
            for record, (of_problem, error) in zip(records, encoded, strict=True)
        ]

    def _encode(self, record: Record, model: AdaptedModel, window: int) -> tuple[list[Example], str]:
        """The problem with its own answer, or with each option's if options are scored; or why it does not fit."""
        outputs = {"generate": [record["output"]], "likelihood": record["outputs"], "normalised": record["choices"]}
        try:
            return [self._example(record, output, model, window) for output in outputs[self.reading]], ""
        except RecordError as error:
            return [], str(error)

    def _example(self, record: Record, output: str, model: AdaptedModel, length: int) -> Example:
        example = encode_record({**record, "output": output}, model.tokenizer, self.template, max_length=length)
        options = model.tokenizer.encode(record["options"], bos=False, eos=False)
        if example.input != record["input"] and not example.input.endswith(model.tokenizer.decode(options)):
            raise RecordError(f"question and options are more than fit into {length} tokens: options would be lost")
        return example

    def _prediction(self, record: Record, examples: list[Example], outputs: list[Any], error: str) -> Record:
        """outputs: the generated text, or each option's loss; empty if there was an error."""
        predicted, text, scores = None, "", None
        if outputs and self.reading == "generate":
            text = outputs[0].strip()
            predicted = read_answer(text, record["choices"])
        elif outputs:
            scores = [-loss for loss in outputs]
            ranked = scores
            if self.reading == "normalised":
                ranked = [s / max(1, len(choice.encode())) for s, choice in zip(scores, record["choices"], strict=True)]
            predicted = ranked.index(max(ranked)) if ranked.count(max(ranked)) == 1 else None
        return {
            "pid": record["pid"],
            "text": text,
            "predicted": None if predicted is None else LETTERS[predicted],
            "answer": LETTERS[record["answer"]],
            "correct": predicted == record["answer"],
            "log_likelihoods": scores,
            "error": error,
            "shortened": any(example.input != record["input"] for example in examples),
            "image_error": record.get("image_error", ""),
        }


def problem_record(problem: Problem) -> Record:
    """A problem as a record for `AnswerProblems`."""
    outputs = [problem.record(i)["output"] for i in range(len(problem.choices))]
    return {
        **problem.record(),
        "pid": problem.pid,
        "options": problem.options,
        "choices": problem.choices,
        "answer": problem.answer,
        "outputs": outputs,
    }


def rejected_problems(predictions: pa.Table, file: str) -> list[dict[str, str]]:
    """{file, pid, reason} of the problems that did not fit, or were answered without their image."""
    rows = predictions.select(["pid", "error", "image_error"]).to_pylist()
    reasons = [{"file": file, "pid": row["pid"], "reason": row["error"] or row["image_error"]} for row in rows]
    return [row for row in reasons if row["reason"]]


def summarize(name: str, problems: list[Problem], predictions: pa.Table, folder: Path) -> dict[str, Any]:
    """The result of an evaluation; its table is also written as `table.md` and `table.csv`."""
    letters = predictions["predicted"].to_pylist()
    predicted = [None if letter is None else LETTERS.index(letter) for letter in letters]
    counts, rows = tabulate(name, problems, predicted)
    columns, lines = accuracy_table(counts, rows)
    overall = accuracy_cell([rows[0].accuracy[AVERAGE] / 100], len(problems), unit="%")
    write_text(folder / "table.md", markdown_table(columns, lines))
    write_csv(folder / "table.csv", columns, lines)
    return {
        "headline": f"{overall} of {len(problems):,} problems",
        "problems": len(problems),
        "with_image": sum(bool(problem.image) for problem in problems),
        "accuracy": round(rows[0].accuracy[AVERAGE], 2),
        "no_answer": letters.count(None),
        "too_long": sum(map(bool, predictions["error"].to_pylist())),
        "shortened": sum(predictions["shortened"].to_pylist()),
        "unreadable_images": sum(map(bool, predictions["image_error"].to_pylist())),
        "accuracy_by_class": [dict(zip(columns, line, strict=True)) for line in lines],
    }


def prediction_examples(
    problems: Sequence[Problem], predictions: Sequence[Mapping[str, Any]], root: Path
) -> tuple[list[tuple[Path, str]], str]:
    """Some problems with an image, for `write_examples`: (image, caption), and a note.

    A caption is the question and the predicted option. predictions: a row of `PREDICTIONS` for each problem. root: the
    folder that image paths start from.
    """
    with_image = [i for i, problem in enumerate(problems) if problem.image]
    wrong, right = ([i for i in with_image if predictions[i]["correct"] == correct] for correct in (False, True))
    examples = []
    for i in mistakes_first(wrong, right):
        options = dict(zip(LETTERS, problems[i].choices, strict=False))
        predicted = options.get(predictions[i]["predicted"], "no answer")
        truth = "" if predictions[i]["correct"] else f", not {options[predictions[i]['answer']]}"
        examples.append((root / problems[i].image, f"{problems[i].question} {predicted}{truth}"))
    return examples, f"Problems with an image: {ORDER}"


def text_examples(problems: Sequence[Problem], predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Some problems without an image as rows of a table: question, options, right option, prediction."""
    without = [i for i, problem in enumerate(problems) if not problem.image]
    wrong, right = ([i for i in without if predictions[i]["correct"] == correct] for correct in (False, True))
    return [
        {
            "question": problems[i].question,
            "options": problems[i].options.removeprefix("Options: "),
            "right": predictions[i]["answer"],
            "predicted": predictions[i]["predicted"] or "no answer",
        }
        for i in mistakes_first(wrong, right)
    ]


def accuracy_table(counts: dict[str, int], rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: percent by class; the first line is the number of problems, then each model and baseline.

    The model's own accuracies, the first of `rows`, have 95% intervals; published ones stand as they are printed.
    """
    classes = (*CLASSES, AVERAGE)
    own, *others = rows
    cells = [accuracy_cell([own.accuracy[c] / 100], counts[c]) if c in own.accuracy else "" for c in classes]
    lines = [[row.name, *(f"{row.accuracy[c]:.2f}" if c in row.accuracy else "" for c in classes)] for row in others]
    return (
        ["accuracy, %", *classes],
        [["problems here", *(str(counts[c]) for c in classes)], [own.name, *cells], *lines],
    )
