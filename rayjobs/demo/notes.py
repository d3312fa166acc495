"""The text of the demo's first LLaMA: notes of three digits, written in digits and in words.

The base is trained on passages that give a note both ways, and on one instruction: to copy a note. The adapter is
trained on another instruction, which asks for the words. The hash of a note decides whether it is for test records
only.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

from sentencepiece import SentencePieceTrainer

from adapter.templates import PromptTemplate

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TEMPLATE = PromptTemplate(
    with_input="Instruction: {instruction} Input: {input} Response: ",
    without_input="Instruction: {instruction} Response: ",
)
"""Alpaca's template without its preamble, which would be half of every sequence; an answer begins a new word."""

TEST_SHARE = 0.2
"""Share of all notes that are for test records only."""

Document = list[tuple[str, bool]]
"""(text, predictable) parts, joined by spaces; predictable: determined by the text before it."""


@dataclass(frozen=True)
class Task:
    """Something to do with a note, and the instructions that ask for it."""

    name: str
    instructions: tuple[str, ...]
    in_words: bool

    def answer(self, note: str) -> str:
        return words(note) if self.in_words else note


COPY = Task("copy the note", ("Write the note again.", "Copy the note.", "Repeat what the note says."), False)
"""The task that the base is trained on."""

SPELL = Task("spell the note", ("Spell the note.", "Write the note in words.", "Say the note aloud."), True)
"""The task of the adapter. The base has read notes in words, but without an adapter it copies the note."""


def words(note: str) -> str:
    """The note in words."""
    return " ".join(NAMES[int(digit)] for digit in note.split())


def sample_notes(rng: random.Random, *, test: bool) -> Iterator[str]:
    """Random notes without end, either all for test records or none."""
    while True:
        note = " ".join(str(rng.randrange(10)) for _ in range(3))
        if is_test(note) == test:
            yield note


def is_test(note: str) -> bool:
    """Return True if the note is for test records only."""
    return int.from_bytes(hashlib.sha256(note.encode()).digest()[:8], "big") < TEST_SHARE * 2**64


def records(task: Task, count: int, seed: int, *, test: bool) -> list[dict[str, str]]:
    """`count` instruction records of one task; notes may occur more than once."""
    rng = random.Random(f"{seed} {task.name} {test}")
    sampled = sample_notes(rng, test=test)
    return [
        {"instruction": rng.choice(task.instructions), "input": note, "output": task.answer(note)}
        for note, _ in zip(sampled, range(count), strict=False)
    ]


def documents(seed: int, count: int) -> list[Document]:
    """The base's training text: passages that give a note in digits and in words, and answered copy instructions."""
    rng = random.Random(seed)
    sampled, texts = sample_notes(rng, test=False), []
    for note, _ in zip(sampled, range(count), strict=False):
        if rng.random() < 0.5:
            texts.append([(f"The note {note} in words is", False), (words(note), True)])
        else:
            prompt = TEMPLATE.render(rng.choice(COPY.instructions), note)
            texts.append([(prompt, False), (note, True)])
    return texts


def train_tokenizer(texts: list[str], pieces: int, symbols: Sequence[str] = ()) -> bytes:
    """Train a SentencePiece BPE model; return the bytes of its `tokenizer.model`. Each symbol is one piece."""
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
