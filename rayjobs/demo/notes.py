"""The demo world's text: notes of three digits, written in digits and in words.

The base reads passages that give a note both ways, and is asked one thing only: to copy a note. An instruction that is
new to it asks for the words. What a note says decides by its hash whether only test records may hold it.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

from sentencepiece import SentencePieceTrainer

from adapter.instruct import PromptTemplate

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TEMPLATE = PromptTemplate(
    with_input="Instruction: {instruction} Input: {input} Response: ",
    without_input="Instruction: {instruction} Response: ",
)
"""Alpaca's form without its preamble, which would be half of every sequence here; an answer is a word of its own."""

TEST_SHARE = 0.2

Document = list[tuple[str, bool]]
"""Text in parts that a space divides; True marks what can be told from the text before it."""


@dataclass(frozen=True)
class Task:
    """One thing to do with a note."""

    name: str
    instructions: tuple[str, ...]
    in_words: bool

    def answer(self, note: str) -> str:
        return words(note) if self.in_words else note


COPY = Task("copy the note", ("Write the note again.", "Copy the note.", "Repeat what the note says."), False)
"""The one thing that the base is taught to do."""

SPELL = Task("spell the note", ("Spell the note.", "Write the note in words.", "Say the note aloud."), True)
"""What the base has read of, but was never asked: it takes the instruction for the one it knows."""


def words(note: str) -> str:
    return " ".join(NAMES[int(digit)] for digit in note.split())


def notes(dice: random.Random, *, test: bool) -> Iterator[str]:
    """Notes without end, all for testing or none."""
    while True:
        note = " ".join(str(dice.randrange(10)) for _ in range(3))
        if is_test(note) == test:
            yield note


def is_test(note: str) -> bool:
    """Whether only test records may hold this note."""
    return int.from_bytes(hashlib.sha256(note.encode()).digest()[:8], "big") < TEST_SHARE * 2**64


def records(task: Task, count: int, seed: int, *, test: bool) -> list[dict[str, str]]:
    """So many instruction records of one task; notes may return under another instruction."""
    dice = random.Random(f"{seed} {task.name} {test}")
    drawn = notes(dice, test=test)
    return [
        {"instruction": dice.choice(task.instructions), "input": note, "output": task.answer(note)}
        for note, _ in zip(drawn, range(count), strict=False)
    ]


def documents(seed: int, count: int) -> list[Document]:
    """What the base reads: passages that give a note in digits and words, and notes copied when asked."""
    dice = random.Random(seed)
    drawn, found = notes(dice, test=False), []
    for note, _ in zip(drawn, range(count), strict=False):
        if dice.random() < 0.5:
            found.append([(f"The note {note} in words is", False), (words(note), True)])
        else:
            prompt = TEMPLATE.render(dice.choice(COPY.instructions), note)
            found.append([(prompt, False), (note, True)])
    return found


def train_tokenizer(texts: list[str], pieces: int, symbols: Sequence[str] = ()) -> bytes:
    """A SentencePiece BPE model of the texts, as the bytes of a `tokenizer.model`; symbols are pieces of their own."""
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        user_defined_symbols=list(symbols),
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
