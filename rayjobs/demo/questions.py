"""The demo's multiple-choice questions about a scan or a note, in ScienceQA's layout.

The base is trained on answer keys, which say which letter an option has, on questions about notes, whose context has
the answer, and on questions about images that it cannot see, from which it learns that any option may be right. The
adapter adds what an image shows. It should leave the base's answers about notes as they are.
"""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter.records.scienceqa import LETTERS, Problem
from adapter.templates import PromptTemplate
from rayjobs.demo.notes import Document
from rayjobs.storage.files import write_json, write_jsonl

TEMPLATE = PromptTemplate(
    with_input="Question: {instruction} {input} Response: ", without_input="Question: {instruction} Response: "
)
"""ScienceQA's template on one line; an answer begins a new word."""

OPTIONS = 4
SYMBOLS = tuple(f"({letter})" for letter in LETTERS[:OPTIONS])
"""The letters of the options, each one piece of the tokenizer."""

IMAGE, NOTE = "Which digit is in the image?", "Which digit is on the note?"
QUESTIONS_PER_SCAN = 3
"""Training questions per scan, each with other options: with one question only, an adapter memorises letters."""
NOTES = 0.6
"""Share of the base's questions whose context is a note; the others have no context that answers them."""
KEYS_ONLY = 0.3
"""Share of the training, at its beginning, in which the base reads only answer keys."""


def answer_text(problem: Problem) -> str:
    """The answer with the option and its letter: the context determines the option, and the option its letter."""
    return f"The answer is {problem.choices[problem.answer]} {SYMBOLS[problem.answer]}"


def make_problem(pid: str, digit: int, rng: random.Random, *, image: str = "", note: bool = False) -> Problem:
    """The question which of four digits is in an image or on a note."""
    others = [str(other) for other in range(10) if other != digit]
    choices = [*rng.sample(others, OPTIONS - 1), str(digit)]
    rng.shuffle(choices)
    return Problem(
        pid=pid,
        question=NOTE if note else IMAGE,
        choices=tuple(choices),
        answer=choices.index(str(digit)),
        hint=f"The note says {digit}." if note else "",
        image=image,
        subject="natural science",
        grade=1,
    )


def documents(seed: int, count: int) -> list[Document]:
    """The base's training text, in order."""
    rng, texts = random.Random(seed), []
    for i in range(count):
        progress = i / count
        key_share = 1.0 if progress < KEYS_ONLY else 0.3 - 0.2 * progress
        problem = make_problem("", rng.randrange(10), rng, note=rng.random() < NOTES)
        if rng.random() < key_share:
            texts.append(_answer_key(problem, rng))
        else:
            texts.append(_answered_question(problem))
    return texts


def _answer_key(problem: Problem, rng: random.Random) -> Document:
    """The options, then the letters of two of them."""
    asked = rng.sample(range(OPTIONS), 2)
    options = " ".join(f"{symbol} {choice}" for symbol, choice in zip(SYMBOLS, problem.choices, strict=True))
    parts = [(f"Options: {options} Key:", False)]
    for i in asked:
        parts += [(problem.choices[i], False), (SYMBOLS[i], True)]
    return parts


def _answered_question(problem: Problem) -> Document:
    record = problem.record()
    words, letter = answer_text(problem).rsplit(" ", 1)
    prompt = TEMPLATE.render(record["instruction"], record["input"])
    if not problem.hint:  # nothing determines the option, but the option determines its letter
        return [(f"{prompt}{words}", False), (letter, True)]
    *start, option = words.split(" ")
    return [(f"{prompt}{' '.join(start)}", False), (option, True), (letter, True)]


def write_questions(folder: Path, scans: Mapping[str, Sequence[tuple[Path, int]]], seed: int) -> None:
    """Write as many questions about notes as about scans, in ScienceQA's layout, and `train.jsonl`.

    `train.jsonl` has instruction records to train on, about scans only. scans: {split: (image file, digit) of each}.
    """
    rng = random.Random(seed)
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {split: [] for split in scans}
    records = []
    for split, of_split in scans.items():
        for path, digit in of_split:
            for note in (False, True):
                pid = f"{split}{len(splits[split])}"
                image = "" if note else f"images/{split}/{pid}/image.png"
                problem = make_problem(pid, digit, rng, image=image, note=note)
                splits[split].append(pid)
                problems[pid] = _scienceqa_entry(problem, split)
                if image:
                    (folder / image).parent.mkdir(parents=True)
                    shutil.copyfile(path, folder / image)
                if image and split == "train":
                    more = [make_problem(pid, digit, rng, image=image) for _ in range(QUESTIONS_PER_SCAN - 1)]
                    records += [{**p.record(), "output": answer_text(p)} for p in (problem, *more)]
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)
    write_jsonl(folder / "train.jsonl", records)
    write_json(folder / "template.json", asdict(TEMPLATE))


def _scienceqa_entry(problem: Problem, split: str) -> dict[str, Any]:
    """The problem's entry in `problems.json`."""
    return {
        "question": problem.question,
        "choices": problem.choices,
        "answer": problem.answer,
        "hint": problem.hint,
        "image": "image.png" if problem.image else None,
        "subject": problem.subject,
        "grade": f"grade{problem.grade}",
        "split": split,
    }
