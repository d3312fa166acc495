"""ScienceQA: read its problems as instruction records, read answers from text, and build the paper's accuracy table.

A folder in the authors' layout holds `problems.json` {pid: {question, choices, answer, hint, image, subject, grade,
split, …}}, `pid_splits.json` {split: [pid, …]} and `images/<split>/<pid>/image.png`. A problem becomes one prompt of
question, textual context and options; lecture and solution are left out. The answer is `The answer is (B).`

LLaMA-Adapter (arXiv 2303.16199), section 4.2; classes as in Lu et al., 2022 (arXiv 2209.09513): a problem with both a
hint and an image counts under TXT and under IMG.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, RecordError
from adapter.file_kind import check_content
from adapter.json_object import parse_json
from adapter.records.files import check_below, check_text
from adapter.records.row import rejected_record
from adapter.templates import PromptTemplate

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
"""Files of the folder."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

TEMPLATE = PromptTemplate(
    with_input="Question: {instruction}\n{input}\nAnswer:", without_input="Question: {instruction}\nAnswer:"
)
"""The input is the context followed by the options, so that a prompt that is too long loses the start of it."""

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
"""Published accuracies, in percent, on the whole test split of 4,241 problems."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its options."""

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    hint: str
    """Textual context; '' if there is none."""
    image: str
    """Path of the image within the data's folder; '' if there is none."""
    subject: str
    grade: int

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the paper's table that the problem belongs to."""
        context = [name for name, present in (("TXT", self.hint), ("IMG", self.image)) if present] or ["NO"]
        return SUBJECTS[self.subject], *context, "G1-6" if self.grade <= 6 else "G7-12"

    @property
    def options(self) -> str:
        """The choices with their letters, as the prompt shows them."""
        return "Options: " + " ".join(f"({x}) {choice}" for x, choice in zip(LETTERS, self.choices, strict=False))

    def record(self, answer: int | None = None) -> dict[str, str]:
        """The problem as an instruction record. answer: index of the choice to answer; the right one if None."""
        context = f"Context: {self.hint}\n" if self.hint else ""
        return {
            "instruction": self.question,
            "input": f"{context}{self.options}",
            "output": f"The answer is ({LETTERS[self.answer if answer is None else answer]}).",
            "image": self.image,
        }


def read_problems(folder: str | Path, split: str) -> list[Problem]:
    """Read the problems of one split, in the order of `pid_splits.json`.

    Raises RecordError, naming the file and the problem, for what is missing or malformed: a part of the split would be
    another measurement.
    """
    problems = []
    for pid, problem in _read_split(folder, split):
        if isinstance(problem, RecordError):
            raise RecordError(f"{folder}/{PROBLEMS}, problem {pid}: {problem}")
        problems.append(problem)
    return problems


def read_problem_records(folder: str | Path, split: str) -> Iterator[dict[str, str]]:
    """Read the problems of one split as instruction records, in order; each malformed one is a `rejected_record`.

    Raises RecordError, naming the file, if `problems.json` or `pid_splits.json` cannot be read or has no such split.
    """
    for pid, problem in _read_split(folder, split):
        if isinstance(problem, RecordError):
            yield rejected_record(f"problem {pid}", str(problem))
        else:
            yield problem.record()


def _read_split(folder: str | Path, split: str) -> Iterator[tuple[str, Problem | RecordError]]:
    """The ids and problems of one split, with an error in place of each malformed one."""
    folder = Path(folder) if isinstance(folder, str) else folder  # keep other path objects, such as URLs
    problems, splits = (_read_object(folder / name) for name in (PROBLEMS, SPLITS))
    if split not in splits:
        raise RecordError(f"{folder / SPLITS}: no split {split!r}; it has {', '.join(splits)}")
    if not isinstance(splits[split], list):
        raise RecordError(f"{folder / SPLITS}: {split!r} must be a list, got {splits[split]!r:.60}")
    for pid in map(str, splits[split]):
        if not isinstance(problems.get(pid), dict):
            yield pid, RecordError(f"no problem {pid}, which {SPLITS} lists under {split!r}")
            continue
        try:
            yield pid, _problem(pid, problems[pid], split)
        except RecordError as error:
            yield pid, error


def _read_object(path: Path) -> dict[str, Any]:
    check_content(path, RecordError)
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordError(f"{path}: no such file; ScienceQA is a folder with {PROBLEMS} and {SPLITS}") from error
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not readable JSON in UTF-8 ({error})") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _problem(pid: str, fields: dict[str, Any], split: str) -> Problem:
    def wrong(key: str, expected: str) -> RecordError:
        return RecordError(f"{key!r} must be {expected}, got {fields.get(key)!r:.60}")

    choices, answer = fields.get("choices"), fields.get("answer")
    grade = re.fullmatch(r"grade(\d+)", str(fields.get("grade")))
    check_text(fields.get("question"), "'question'")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise wrong("choices", f"a list of 2 to {len(LETTERS)} options")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise wrong("answer", f"a choice's index, 0 to {len(choices) - 1}")
    if fields.get("subject") not in tuple(SUBJECTS):
        raise wrong("subject", f"one of {', '.join(SUBJECTS)}")
    if grade is None:
        raise wrong("grade", "grade1 to grade12")
    hint, image = fields.get("hint") or "", fields.get("image") or ""
    for key, value in (("hint", hint), ("image", image)):
        if not isinstance(value, str):
            raise wrong(key, "text or null")
    for name, value in (("'hint'", hint), ("'image'", image), *((f"choice {c!r:.60}", str(c)) for c in choices)):
        check_text(value, name)
    # A mini split lists problems of a whole split, whose folder has the images.
    image = check_below(f"images/{fields.get('split') or split}/{pid}/{image}", "'image'") if image else ""
    return Problem(
        pid=pid,
        question=fields["question"],
        choices=tuple(str(choice) for choice in choices),
        answer=answer,
        hint=hint if hint.strip() else "",
        image=image,
        subject=fields["subject"],
        grade=int(grade[1]),
    )


_BRACKETED = r"(?<!\w)\(\s*([A-Za-z])\s*\)"
_ALONE = r"\b([A-Z])(?=\s*(?:[.,:;()\n]|$)|\s+(?:[–—-]\s|(?:because|since|as|and|or)\b))"
"""A capital letter that is not a word: "B.", "B because", but not "A rose"."""
_STATED = re.compile(rf"(?i:answer\s*(?:is|:)\s*:?|option|choice)\s*(?:{_BRACKETED}|{_ALONE})")
_FIRST = re.compile(rf"\s*{_ALONE}")
_LETTERED = re.compile(_BRACKETED)
_ANOTHER = re.compile(rf"\s*(?:,|,?\s*\b(?:and|or)\b|/|&)\s*(?:{_BRACKETED}|{_ALONE})")
_DENIED = re.compile(
    r"(?:\b(?:can)?not|\bnor|\bneither|\bnever|n't)(?:\s+(?:be|the|an?|option|choice|answer))*\s*$", re.IGNORECASE
)


def read_answer(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a generated text names; None if it names none, or several.

    It is searched for in this order: a statement such as "the answer is (B)", "the answer is B" or "option B"; a text
    that begins with a letter; a single letter in brackets; the words of a single choice. A choice that the text denies
    ("not (B)") is not named, and neither is a letter beyond the choices.
    """
    plain = re.sub(r"[*_`]", "", text).translate(str.maketrans("[]", "()"))
    if stated := next(_not_denied(_STATED, plain), None) or _FIRST.match(plain):
        letter = next(letter for letter in stated.groups() if letter)
        return None if _ANOTHER.match(plain, stated.end()) else _letter_index(letter, choices)
    if any(_LETTERED.finditer(plain)):
        letters = {match[1].upper() for match in _not_denied(_LETTERED, plain)}
        return _letter_index(letters.pop(), choices) if len(letters) == 1 else None
    return _words_index(text, choices)


def _not_denied(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Matches of the pattern that do not follow a denial."""
    return (match for match in pattern.finditer(text) if not _DENIED.search(text[: match.start()]))


def _words_index(text: str, choices: Sequence[str]) -> int | None:
    """Index of the only choice whose words the text contains."""
    text = " ".join(text.split())
    choices = [" ".join(choice.split()) for choice in choices]
    lowered = [choice.lower() for choice in choices]
    named = []
    for i, choice in enumerate(choices):
        case_matters = lowered.count(lowered[i]) > 1  # another choice differs from this one in its capitals alone
        # "5 m" is named neither by "2.5 m" nor by "-5 m"
        pattern = rf"(?<![\w−-])(?<!\d[.,]){re.escape(choice)}(?!\w|[.,]\d)"
        if choice and any(_not_denied(re.compile(pattern, 0 if case_matters else re.IGNORECASE), text)):
            named.append(i)
    # "dark red" does not name "red" too, if both are choices
    named = [i for i in named if not any(lowered[i] != lowered[j] and lowered[i] in lowered[j] for j in named)]
    return named[0] if len(named) == 1 else None


def _letter_index(letter: str, choices: Sequence[str]) -> int | None:
    index = LETTERS.index(letter.upper())
    return index if index < len(choices) else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    """The method."""
    accuracy: Mapping[str, float]
    """Percent of right answers by class, and over all problems."""


def tabulate(
    name: str, problems: Sequence[Problem], predicted: Sequence[int | None]
) -> tuple[dict[str, int], list[Row]]:
    """Count the problems of each class, and compare accuracies by class.

    name: of the method that made the predictions. predicted: the index of the predicted choice of each problem, or None
    for no answer, which counts as wrong.

    Returns {class: problems}, and one row each for the predictions, for two baselines on the same problems, and for the
    published methods. One baseline always answers the letter that is right most often among these problems; the other
    is the expected accuracy of a random guess.

    Raises AdapterError if there is no problem.
    """
    if not problems:
        raise AdapterError("there are no problems to score")
    counts = Counter(problem.answer for problem in problems)
    letter = max(sorted(counts), key=counts.__getitem__)
    right = {
        name: [float(guess == problem.answer) for problem, guess in zip(problems, predicted, strict=True)],
        f"always ({LETTERS[letter]})": [float(problem.answer == letter) for problem in problems],
        "random": [1 / len(problem.choices) for problem in problems],
    }
    members = {group: [i for i, problem in enumerate(problems) if group in problem.classes] for group in CLASSES}
    members[AVERAGE] = list(range(len(problems)))
    rows = [
        Row(
            name=method,
            accuracy={
                group: 100 * sum(scores[i] for i in indices) / len(indices)
                for group, indices in members.items()
                if indices
            },
        )
        for method, scores in right.items()
    ]
    rows += [Row(name=method, accuracy=accuracy) for method, accuracy in PUBLISHED.items()]
    return {group: len(indices) for group, indices in members.items()}, rows
