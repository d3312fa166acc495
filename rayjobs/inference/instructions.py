"""Answer instruction records: the task of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import pyarrow as pa
from torch import Tensor

from adapter.model import AdaptedModel
from adapter.templates import Template
from rayjobs.inference.batch import Record
from rayjobs.inference.decoding import DecodingConfig

ANSWERS = pa.schema([(name, pa.string()) for name in ("instruction", "input", "image", "image_error", "answer")])
"""A record's answer, null if its image cannot be read; the other texts are empty if there are none."""


@dataclass(frozen=True)
class AnswerInstructions:
    """A `GenerationTask`: answers a chunk of records."""

    template: Template
    decoding: DecodingConfig

    def __call__(self, model: AdaptedModel, records: list[Record], images: list[Tensor | None]) -> list[Record]:
        """A row of `ANSWERS` for each record; a record whose image cannot be read is not answered."""
        readable = [not record.get("image_error") for record in records]
        answers = iter(self.answers(model, list(compress(records, readable)), list(compress(images, readable))))
        return [
            {**{name: record.get(name) or "" for name in ANSWERS.names}, "answer": next(answers) if read else None}
            for record, read in zip(records, readable, strict=True)
        ]

    def answers(self, model: AdaptedModel, records: Sequence[Record], images: Sequence[Tensor | None]) -> list[str]:
        """Answers to instructions, conversations and prompts."""
        return model.answer_records(records, self.decoding, images=images, template=self.template)


def evenly_spaced(rows: list[Record], count: int = 12) -> list[Record]:
    """Up to `count` of the rows, at equal distances."""
    return rows[:: max(1, len(rows) // count)][:count]
