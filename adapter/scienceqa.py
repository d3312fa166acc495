"""ScienceQA: problems in their original layout, as instruction records, and the paper's table of eight classes.

A folder holds `problems.json` {pid: {question, choices, answer, hint, image, subject, grade, split, …}},
`pid_splits.json` {split: [pid, …]} and `images/<split>/<pid>/image.png`. A problem becomes one prompt of question,
textual context and options; lecture and solution are left out. The answer is `The answer is (B).`

LLaMA-Adapter (arXiv 2303.16199), section 4.2; classes as in Lu et al., 2022 (arXiv 2209.09513): a problem with both a
hint and an image counts under TXT and under IMG.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, RecordError
from adapter.instruct import PromptTemplate

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

TEMPLATE = PromptTemplate(
    with_input="Question: {instruction}\n{input}\nAnswer:", without_input="Question: {instruction}\nAnswer:"
)
"""The input is context and options, context first: what is too long loses the beginning of its context."""

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
AVERAGE = "average"

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    f"{method}, published": dict(zip((*CLASSES, AVERAGE), accuracies, strict=True))
    for method, accuracies in {
        "random choice": (40.28, 46.13, 29.25, 47.45, 40.08, 33.66, 39.35, 40.67, 39.83),
        "LLaMA-Adapter 7B, text only (1.2 M)": (79.00, 73.79, 80.55, 78.30, 70.35, 83.14, 79.77, 75.68, 78.31),
        "LLaMA-Adapter 7B (1.8 M)": (84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05, 85.19),
    }.items()
}
"""Percent of the whole test split, 4,241 problems."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its options."""

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Place of the right one among the choices."""
    hint: str
    """Textual context, '' where there is none."""
    image: str
    """Path of its image below the data's folder, '' where there is none."""
    subject: str
    grade: int

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the paper's table that it counts under."""
        context = [name for name, there in (("TXT", self.hint), ("IMG", self.image)) if there] or ["NO"]
        return SUBJECTS[self.subject], *context, "G1-6" if self.grade <= 6 else "G7-12"

    @property
    def options(self) -> str:
        return "Options: " + " ".join(f"({x}) {choice}" for x, choice in zip(LETTERS, self.choices, strict=False))

    def record(self, answer: int | None = None) -> dict[str, str]:
        """It as an instruction record; `answer` is the right one unless another is given."""
        context = f"Context: {self.hint}\n" if self.hint else ""
        return {
            "instruction": self.question,
            "input": f"{context}{self.options}",
            "output": f"The answer is ({LETTERS[self.answer if answer is None else answer]}).",
            "image": self.image,
        }


def read_problems(folder: str | Path, split: str) -> list[Problem]:
    """The problems of one split, in the order of `pid_splits.json`.

    Raises RecordError naming the file and the problem that is missing or malformed.
    """
    folder = Path(folder) if isinstance(folder, str) else folder  # as it is, such as a folder in a bucket
    problems, splits = (_read_object(folder / name) for name in ("problems.json", "pid_splits.json"))
    if split not in splits:
        raise RecordError(f"{folder / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    if not isinstance(splits[split], list):
        raise RecordError(f"{folder / 'pid_splits.json'}: {split!r} must be a list, got {splits[split]!r:.60}")
    return [_problem(folder / "problems.json", problems, str(pid), split) for pid in splits[split]]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no such file; ScienceQA is a folder with problems.json and pid_splits.json") from (
            error
        )
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _problem(path: Path, problems: dict[str, Any], pid: str, split: str) -> Problem:
    found = problems.get(pid)
    if not isinstance(found, dict):
        raise RecordError(f"{path}: no problem {pid}, which pid_splits.json lists under {split!r}")

    def wrong(key: str, wanted: str) -> RecordError:
        return RecordError(f"{path}, problem {pid}: {key!r} must be {wanted}, got {found.get(key)!r:.60}")

    choices, answer, grade = (
        found.get("choices"),
        found.get("answer"),
        re.fullmatch(r"grade(\d+)", str(found.get("grade"))),
    )
    if not isinstance(found.get("question"), str):
        raise wrong("question", "text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise wrong("choices", f"a list of 2 to {len(LETTERS)} options")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise wrong("answer", f"a choice's place, 0 to {len(choices) - 1}")
    if found.get("subject") not in SUBJECTS:
        raise wrong("subject", f"one of {', '.join(SUBJECTS)}")
    if grade is None:
        raise wrong("grade", "grade1 to grade12")
    hint, image = found.get("hint") or "", found.get("image") or ""
    for key, value in (("hint", hint), ("image", image)):
        if not isinstance(value, str):
            raise wrong(key, "text or null")
    return Problem(
        pid=pid,
        question=found["question"],
        choices=tuple(str(choice) for choice in choices),
        answer=answer,
        hint=hint if hint.strip() else "",
        # mini splits list problems of the whole ones, and images lie under those
        image=f"images/{found.get('split') or split}/{pid}/{image}" if image else "",
        subject=found["subject"],
        grade=int(grade[1]),
    )


_BRACKETED = r"(?<!\w)\(\s*([A-Za-z])\s*\)"
_ALONE = r"\b([A-Z])(?=\s*(?:[.,:;()\n]|$)|\s+(?:[–—-]\s|(?:because|since|as|and|or)\b))"
"""A capital that is no word: "B.", "B because", but not "A rose"."""
_STATED = re.compile(rf"(?i:answer\s*(?:is|:)\s*:?|option|choice)\s*(?:{_BRACKETED}|{_ALONE})")
_FIRST = re.compile(rf"\s*{_ALONE}")
_LETTERED = re.compile(_BRACKETED)
_ANOTHER = re.compile(rf"\s*(?:,|,?\s*\b(?:and|or)\b|/|&)\s*(?:{_BRACKETED}|{_ALONE})")
_DENIED = re.compile(
    r"(?:\b(?:can)?not|\bnor|\bneither|\bnever|n't)(?:\s+(?:be|the|an?|option|choice|answer))*\s*$", re.IGNORECASE
)


def read_answer(text: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that a generated text names; None where it names none, or several.

    Looked for in this order: "the answer is (B)", "… B" or "option B"; the text as a bare letter; one letter in
    brackets; one choice's own words. What is denied is not named, and a letter beyond the choices names none of them.
    """
    plain = re.sub(r"[*_`]", "", text).translate(str.maketrans("[]", "()"))
    if stated := next(_not_denied(_STATED, plain), None) or _FIRST.match(plain):
        letter = next(letter for letter in stated.groups() if letter)
        return None if _ANOTHER.match(plain, stated.end()) else _place(letter, choices)
    if any(_LETTERED.finditer(plain)):
        letters = {lettered[1].upper() for lettered in _not_denied(_LETTERED, plain)}
        return _place(letters.pop(), choices) if len(letters) == 1 else None
    return _place_of_words(text, choices)


def _not_denied(what: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    return (found for found in what.finditer(text) if not _DENIED.search(text[: found.start()]))


def _place_of_words(text: str, choices: Sequence[str]) -> int | None:
    said = " ".join(text.split())
    wanted = [" ".join(choice.split()) for choice in choices]
    lowered = [words.lower() for words in wanted]
    named = []
    for place, words in enumerate(wanted):
        exactly = lowered.count(lowered[place]) > 1  # a choice that differs from another in its capitals alone
        # "5 m" is named neither by "2.5 m" nor by "-5 m"
        pattern = rf"(?<![\w−-])(?<!\d[.,]){re.escape(words)}(?!\w|[.,]\d)"
        if words and any(_not_denied(re.compile(pattern, 0 if exactly else re.IGNORECASE), said)):
            named.append(place)
    # "4" is named by "14 km" no more than "red" by "dark red", where that is a choice too
    named = [
        place
        for place in named
        if not any(lowered[place] != lowered[other] and lowered[place] in lowered[other] for other in named)
    ]
    return named[0] if len(named) == 1 else None


def _place(letter: str, choices: Sequence[str]) -> int | None:
    place = LETTERS.index(letter.upper())
    return place if place < len(choices) else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: percent by class, and over all."""

    name: str
    accuracy: Mapping[str, float]


def tabulate(
    name: str, problems: Sequence[Problem], predicted: Sequence[int | None]
) -> tuple[dict[str, int], list[Row]]:
    """How many problems each class has, and accuracies: ours, two baselines on the very same problems, the paper's.

    No answer is a wrong answer. The majority baseline always gives the letter that is right most often among these
    problems; the random one is the chance of a blind guess.

    Raises ValueError for no problem at all.
    """
    if not problems:
        raise AdapterError("there is no problem to score")
    counts = Counter(problem.answer for problem in problems)
    letter = max(sorted(counts), key=counts.__getitem__)
    right = {
        name: [float(guess == problem.answer) for problem, guess in zip(problems, predicted, strict=True)],
        f"always ({LETTERS[letter]})": [float(problem.answer == letter) for problem in problems],
        "random": [1 / len(problem.choices) for problem in problems],
    }
    places = {group: [i for i, problem in enumerate(problems) if group in problem.classes] for group in CLASSES}
    places[AVERAGE] = list(range(len(problems)))
    rows = [
        Row(
            name=method,
            accuracy={g: 100 * sum(scores[i] for i in within) / len(within) for g, within in places.items() if within},
        )
        for method, scores in right.items()
    ]
    rows += [Row(name=method, accuracy=accuracy) for method, accuracy in PUBLISHED.items()]
    return {group: len(within) for group, within in places.items()}, rows
