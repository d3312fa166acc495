"""ScienceQA over workers: every problem answered by greedy decoding or by the likelihood of its options, then the
paper's table."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from torch import Tensor

from adapter.errors import RecordError
from adapter.instruct import Example, PromptTemplate, encode_record
from adapter.model import AdaptedModel
from adapter.scienceqa import AVERAGE, CLASSES, LETTERS, Problem, Row, read_answer, tabulate
from rayjobs.inference.batch import Record
from rayjobs.reporting.example_gallery import ORDER, mistakes_first
from rayjobs.storage.files import write_text

Reading = Literal["generate", "likelihood"]

MAX_ANSWER_TOKENS = 32
"""Tokens of an answer; `The answer is (A).` has about eight."""

PREDICTIONS = pa.schema(
    [
        ("pid", pa.string()),
        ("text", pa.string()),  # what was generated; empty where options were scored
        ("predicted", pa.string()),  # the option's letter; null where the text names none
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("log_likelihoods", pa.list_(pa.float64())),  # of every option's answer, where they were scored
        ("error", pa.string()),  # why it could not be asked at all
        ("shortened", pa.bool_()),  # whether its context lost its beginning, for the prompt to fit
        ("image_error", pa.string()),  # why its image could not be read; it was then answered without
    ]
)


class AnswerProblems:
    """What a worker does with a chunk of problems."""

    def __init__(self, template: PromptTemplate, reading: Reading, max_length: int) -> None:
        self.template, self.reading, self.max_length = template, reading, max_length

    def __call__(self, base: AdaptedModel) -> Callable[[list[Record], list[Tensor | None]], list[Record]]:
        return lambda records, images: list(self.answered(base, records, images))

    def answered(self, base: AdaptedModel, records: list[Record], images: list[Tensor | None]) -> Iterator[Record]:
        """A row of `PREDICTIONS` for each problem."""
        window = min(base.model.config.max_seq_len, self.max_length)
        generating = self.reading == "generate"
        asked: list[list[Example]] = []
        for record in records:
            outputs = [record["output"]] if generating else record["outputs"]
            try:
                asked.append([self._example(record, o, base, window - MAX_ANSWER_TOKENS * generating) for o in outputs])
            except RecordError as error:
                asked.append([])
                record["error"] = str(error)
        examples = [example for mine in asked for example in mine]
        seen = [image for image, mine in zip(images, asked, strict=True) for _ in mine]
        if generating:
            prompts = [example.ids[: example.label_start] for example in examples]
            texts = iter(base.continue_ids(prompts, images=seen, max_new_tokens=MAX_ANSWER_TOKENS, temperature=0))
        else:
            losses = iter(base.losses(examples, images=seen))
        for record, mine in zip(records, asked, strict=True):
            predicted, text, scores = None, "", None
            if mine and generating:
                text = next(texts)
                predicted = read_answer(text, record["choices"])
            elif mine:
                scores = [-next(losses) for _ in mine]
                best = max(scores)
                predicted = scores.index(best) if scores.count(best) == 1 else None
            yield {
                "pid": record["pid"],
                "text": text,
                "predicted": None if predicted is None else LETTERS[predicted],
                "answer": LETTERS[record["answer"]],
                "correct": predicted == record["answer"],
                "log_likelihoods": scores,
                "error": record.get("error", ""),
                "shortened": any(example.input != record["input"] for example in mine),
                "image_error": record.get("image_error", ""),
            }

    def _example(self, record: Record, output: str, base: AdaptedModel, length: int) -> Example:
        example = encode_record({**record, "output": output}, base.tokenizer, self.template, max_length=length)
        pieces = base.tokenizer.encode(record["options"], bos=False, eos=False)
        if example.input != record["input"] and not example.input.endswith(base.tokenizer.decode(pieces)):
            raise RecordError(f"question and options are more than fit into {length} tokens: options would be lost")
        return example


def asked(problem: Problem) -> Record:
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


def summarise(name: str, problems: list[Problem], predictions: pa.Table, folder: Path) -> dict[str, Any]:
    """The result of an evaluation; writes its table as `table.md` and `table.csv`."""
    letters = predictions["predicted"].to_pylist()
    found = [None if letter is None else LETTERS.index(letter) for letter in letters]
    counts, rows = tabulate(name, problems, found)
    columns, lines = table(counts, rows)
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    write_text(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in [columns, rule, *lines]))
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([columns, *lines])
    write_text(folder / "table.csv", written.getvalue())
    return {
        "headline": f"{rows[0].accuracy[AVERAGE]:.2f}% of {len(problems):,} problems",
        "problems": len(problems),
        "with_image": sum(bool(problem.image) for problem in problems),
        "accuracy": round(rows[0].accuracy[AVERAGE], 2),
        "no_answer": letters.count(None),
        "too_long": sum(map(bool, predictions["error"].to_pylist())),
        "shortened": sum(predictions["shortened"].to_pylist()),
        "unreadable_images": sum(map(bool, predictions["image_error"].to_pylist())),
        "accuracy_by_class": [dict(zip(columns, line, strict=True)) for line in lines],
    }


def examples(
    problems: Sequence[Problem], answered: Sequence[Mapping[str, Any]], root: Path
) -> tuple[list[tuple[Path, str]], str]:
    """Some problems with an image for `write_examples`: question and options, and the option that was taken.

    answered: a row of `PREDICTIONS` for each problem. root: what the images' paths start from.
    """
    seen = [i for i, problem in enumerate(problems) if problem.image]
    wrong, right = ([i for i in seen if answered[i]["correct"] == correct] for correct in (False, True))
    shown = []
    for i in mistakes_first(wrong, right):
        options = dict(zip(LETTERS, problems[i].choices, strict=False))
        taken = options.get(answered[i]["predicted"], "no answer")
        truth = "" if answered[i]["correct"] else f", not {options[answered[i]['answer']]}"
        shown.append((root / problems[i].image, f"{problems[i].question} {taken}{truth}"))
    return shown, f"Problems with an image: {ORDER}"


def table(counts: dict[str, int], rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: percent by class, how many problems each class has, the baselines, the paper's."""
    groups = (*CLASSES, AVERAGE)
    lines = [[row.name, *(f"{row.accuracy[g]:.2f}" if g in row.accuracy else "" for g in groups)] for row in rows]
    return ["accuracy, %", *groups], [["problems here", *(str(counts[g]) for g in groups)], *lines]
