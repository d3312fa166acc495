"""The demo's questions: four lettered options about a scan, or about a note, in ScienceQA's own layout.

The base reads answer keys, which tell what letter stood before an option, and questions about notes, whose context
holds the answer; it is also asked about images it cannot see, and learns that any option may be right. What an image
shows only an adapter can tell it. To read notes is the text skill that an adapter must leave as it is.
"""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter.instruct import PromptTemplate
from adapter.scienceqa import LETTERS, Problem
from rayjobs.demo.notes import Document
from rayjobs.storage.files import write_json, write_jsonl

TEMPLATE = PromptTemplate(
    with_input="Question: {instruction} {input} Response: ", without_input="Question: {instruction} Response: "
)
"""ScienceQA's form on one line; an answer is a word of its own."""

OPTIONS = 4
SYMBOLS = tuple(f"({letter})" for letter in LETTERS[:OPTIONS])
"""What the tokenizer keeps whole."""

IMAGE, NOTE = "Which digit is in the image?", "Which digit is on the note?"
QUESTIONS_PER_SCAN = 3
"""To train on, each with other options: with a single one, an adapter learns letters by heart."""
NOTES = 0.6
"""The share of questions that a note answers; nothing answers the others."""
KEYS_ONLY = 0.3
"""The share of training in which the base reads answer keys alone: how to look a letter up, before why."""


def answer(problem: Problem) -> str:
    """The option and its letter: the option can be told from the evidence, and the letter from the option."""
    return f"The answer is {problem.choices[problem.answer]} {SYMBOLS[problem.answer]}"


def problem(pid: str, digit: int, dice: random.Random, *, image: str = "", note: bool = False) -> Problem:
    """Which of four digits it is, by an image, a note, or neither."""
    others = [str(other) for other in range(10) if other != digit]
    choices = [*dice.sample(others, OPTIONS - 1), str(digit)]
    dice.shuffle(choices)
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
    """What the base reads, in order."""
    dice, found = random.Random(seed), []
    for i in range(count):
        progress = i / count
        keys = 1.0 if progress < KEYS_ONLY else 0.3 - 0.2 * progress
        one = problem("", dice.randrange(10), dice, note=dice.random() < NOTES)
        if dice.random() < keys:
            shown = dice.sample(range(OPTIONS), 2)
            options = " ".join(f"{symbol} {choice}" for symbol, choice in zip(SYMBOLS, one.choices, strict=True))
            parts = [(f"Options: {options} Key:", False)]
            for place in shown:
                parts += [(one.choices[place], False), (SYMBOLS[place], True)]
            found.append(parts)
            continue
        record = one.record()
        said = answer(one)
        words, letter = said.rsplit(" ", 1)
        prompt = TEMPLATE.render(record["instruction"], record["input"])
        if one.hint:
            *start, option = words.split(" ")
            found.append([(f"{prompt}{' '.join(start)}", False), (option, True), (letter, True)])
        else:  # no evidence: the option is a guess, its letter is not
            found.append([(f"{prompt}{words}", False), (letter, True)])
    return found


def write_questions(folder: Path, scans: Mapping[str, Sequence[tuple[Path, int]]], seed: int) -> None:
    """Questions about scans, and as many about notes, as a folder in ScienceQA's layout. `train.jsonl` has those to
    train on, about images alone, as records.

    scans: {split: (image, digit) of each}.
    """
    dice = random.Random(seed)
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {split: [] for split in scans}
    records = []
    for split, listed in scans.items():
        for path, digit in listed:
            for note in (False, True):
                pid = f"{split}{len(splits[split])}"
                image = "" if note else f"images/{split}/{pid}/image.png"
                one = problem(pid, digit, dice, image=image, note=note)
                splits[split].append(pid)
                problems[pid] = {
                    "question": one.question,
                    "choices": one.choices,
                    "answer": one.answer,
                    "hint": one.hint,
                    "image": "image.png" if image else None,
                    "subject": one.subject,
                    "grade": f"grade{one.grade}",
                    "split": split,
                }
                if image:
                    (folder / image).parent.mkdir(parents=True)
                    shutil.copyfile(path, folder / image)
                if image and split == "train":
                    again = [problem(pid, digit, dice, image=image) for _ in range(QUESTIONS_PER_SCAN - 1)]
                    records += [{**each.record(), "output": answer(each)} for each in (one, *again)]
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)
    write_jsonl(folder / "train.jsonl", records)
    write_json(folder / "template.json", asdict(TEMPLATE))
