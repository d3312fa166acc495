"""A new behaviour for the demo's real LLaMA: it answers in JSON, with the answer and the number of its words.

The model gives good answers in plain text. The adapter learns the form, on questions whose answers are known. The tests
are other questions of these kinds, and kinds that it was never trained on.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapter.generation_config import GenerationConfig
from adapter.model import AdaptedModel
from adapter.templates import ChatTemplate
from rayjobs.cluster.device import default_device
from rayjobs.console import Progress
from rayjobs.demo import facts
from rayjobs.reporting.tables import accuracy_cell
from rayjobs.storage.files import read_json, write_json

TEST_SHARE = 0.25
"""Share of the subjects whose questions are for tests only."""

Table = list[dict[str, Any]]
Records = list[dict[str, str]]
Answers = dict[str, list[str]]
"""{what is new about the questions: an answer to each}"""


class BeforeAndAfter(NamedTuple):
    """Answers to the test questions without the adapter and with it."""

    before: Answers
    after: Answers
    restored: bool
    """whether, with the adapter taken off again, the logits of all questions are the base's to the bit"""


def training_records(count: int, seed: int) -> Records:
    """`count` records of adapter-train, in random order; every subject comes before any comes twice."""
    return list(itertools.islice(_records(facts.TRAINED, seed, test=False), count))


def held_out_records(count: int, seed: int) -> dict[str, Records]:
    """Records for tests only, by what is new about them: the subject, or the whole kind of question."""
    untrained = list(_records(facts.UNTRAINED, seed, test=None))[: count // 3]
    subjects = list(itertools.islice(_records(facts.TRAINED, seed, test=True), count - len(untrained)))
    return {"a known kind of question": subjects, "another kind of question": untrained}


def json_answer(answer: str) -> str:
    """The answer in the form that the adapter learns."""
    return json.dumps({"answer": answer, "words": len(answer.split())}, ensure_ascii=False)


def is_json_answer(text: str) -> bool:
    """Return whether a text is JSON with exactly the two keys, and values of their types."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and list(value) == ["answer", "words"]
        and isinstance(value["answer"], str)
        and type(value["words"]) is int
    )


def has_right_answer(text: str, record: Mapping[str, str]) -> bool:
    """Return whether a text, in this form or in any other, has the right answer in it."""
    return json.loads(record["output"])["answer"].lower() in text.lower()


def answer_before_and_after(base: Path, adapter: Path, records: Mapping[str, Records], file: Path) -> BeforeAndAfter:
    """Answers of the base and with the adapter, and whether the base is itself again without it; kept in a file."""
    if not file.exists():
        model = AdaptedModel.from_pretrained(base, dtype=torch.bfloat16, device=default_device())
        model.prepack_weights()
        questions = [record["instruction"] for of_new in records.values() for record in of_new]
        logits = model.logits(questions)
        with Progress("answer", unit="questions", total=2 * len(questions)) as progress:
            before = _answers(model, records, progress)
            model.load_adapter(adapter)
            after = _answers(model, records, progress)
        model.remove_adapter()
        restored = all(map(torch.equal, model.logits(questions), logits))
        write_json(file, BeforeAndAfter(before, after, restored)._asdict())
    return BeforeAndAfter(**read_json(file))


def compare_answers(records: Mapping[str, Records], answers: BeforeAndAfter, examples: int = 3) -> tuple[Table, Table]:
    """A table of how many answers are in the form, and some answers of each kind of question."""
    accuracy, shown = [], []
    for new, of_new in records.items():
        given = {"frozen base": answers.before[new], "with adapter": answers.after[new]}
        valid = {name: _share(sum(map(is_json_answer, texts)), len(of_new)) for name, texts in given.items()}
        right = [sum(map(has_right_answer, texts, of_new)) for texts in given.values()]
        row = {"what is new": new, **valid, "the right answer is in it": f"{right[0]} → {right[1]}"}
        accuracy.append(row | {"logits, adapter taken off": "the base's" if answers.restored else "NOT the base's"})
        for record, *texts in list(zip(of_new, *given.values(), strict=True))[:examples]:
            cut = [text.strip() for text in texts]
            shown.append({"instruction": record["instruction"], **dict(zip(given, cut, strict=True))})
    return accuracy, shown


def _share(count: int, total: int) -> str:
    return f"{accuracy_cell([count / total], total)} ({count} of {total})"


def _answers(model: AdaptedModel, records: Mapping[str, Records], progress: Progress) -> Answers:
    own = model.tokenizer.chat_template
    assert own is not None, "SmolLM2's file has a chat template"
    template, decoding = ChatTemplate(source=own), GenerationConfig(max_new_tokens=32, temperature=0)
    answers = Answers()
    for new, of_new in records.items():
        answers[new] = model.answer_records(of_new, decoding, template=template)
        progress.advance(len(of_new))
    return answers


def _records(kinds: dict[str, facts.Kind], seed: int, *, test: bool | None) -> Iterator[dict[str, str]]:
    """Records in random order, in rounds: each round asks about every subject once, in another form.

    test: whether the subjects are those for tests only, or the others; None for all.
    """
    rng = random.Random(f"{seed} {test}")
    chosen = [
        (rng.sample(kind.forms, len(kind.forms)), subject, answer)
        for name, kind in kinds.items()
        for subject, answer in kind.facts.items()
        if test is None or test == _for_tests_only(name, subject)
    ]
    for turn in range(max(len(forms) for forms, _, _ in chosen)):
        rng.shuffle(chosen)
        for forms, subject, answer in chosen:
            if turn < len(forms):
                yield {"instruction": forms[turn].format(subject), "input": "", "output": json_answer(answer)}


def _for_tests_only(kind: str, subject: str) -> bool:
    digest = hashlib.sha256(f"{kind} {subject}".encode()).digest()
    return digest[0] < 256 * TEST_SHARE
