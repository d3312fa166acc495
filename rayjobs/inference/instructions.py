"""Answer instruction records: the decoding settings, and the task of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import pyarrow as pa
from pydantic import Field
from torch import Tensor

from adapter.generate import GenerationConfig
from adapter.model import AdaptedModel
from adapter.templates import Template
from rayjobs.config import config
from rayjobs.inference.batch import Record

ANSWERS = pa.schema([(name, pa.string()) for name in ("instruction", "input", "image", "image_error", "answer")])
"""A record's answer, null if its image cannot be read; the other texts are empty if there are none."""


@config
class DecodingConfig(GenerationConfig):
    """Decoding settings; the defaults are those of LLaMA-Adapter."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of an answer."""
    temperature: float = Field(default=0.1, ge=0)
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this."""
    seed: int = Field(default=0, ge=0)
    """Sampling seed."""


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
