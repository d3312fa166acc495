"""The requests of lm-evaluation-harness as records of token ids, and what a worker makes of them.

Records do not need the harness, so that workers need not have it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from torch import Tensor

from adapter.engine.engine import Engine
from adapter.engine.request import Request
from adapter.generation_config import GenerationConfig
from adapter.likelihood import likelihoods
from adapter.model import AdaptedModel
from rayjobs.inference.batch import Record

SCORES = pa.schema([("log_likelihood", pa.float64()), ("greedy", pa.bool_())])
"""Columns of a scored continuation; see `adapter.likelihood.Likelihood`."""
CONTINUATIONS = pa.schema([("text", pa.string())])
"""Columns of a generated continuation."""


@dataclass(frozen=True)
class ScoreContinuations:
    """A `GenerationTask`: scores records {context, continuation} of token ids."""

    token_budget: int
    """tokens of a batch, padding included"""

    def __call__(self, model: AdaptedModel, records: list[Record], images: list[Tensor | None]) -> list[Record]:
        """A row of `SCORES` for each record. Neighbours that begin alike are fastest."""
        rows: list[Record] = []
        for batch in _batches(records, self.token_budget):
            contexts, continuations = ([record[key] for record in batch] for key in ("context", "continuation"))
            rows += [found._asdict() for found in likelihoods(model.model, contexts, continuations)]
        return rows


def _batches(records: Sequence[Record], token_budget: int) -> Iterator[Sequence[Record]]:
    """The records in order, in batches of at most so many tokens with padding; a longer record is alone in its own."""
    start, longest = 0, 0
    for end, record in enumerate(records):
        length = len(record["context"]) + len(record["continuation"])
        if end > start and max(longest, length) * (end + 1 - start) > token_budget:
            yield records[start:end]
            start, longest = end, 0
        longest = max(longest, length)
    yield records[start:]


@dataclass(frozen=True)
class ContinuePrompts:
    """A `GenerationTask`: continues records {prompt, repeat, until, max_new_tokens, temperature, top_p, top_k, seed}.

    `prompt` is token ids, and `repeat` the number of equal records before the record, which draws other numbers.
    """

    stop_ids: frozenset[int]
    """ids that end a continuation"""

    def __call__(self, model: AdaptedModel, records: list[Record], images: list[Tensor | None]) -> list[Record]:
        """A row of `CONTINUATIONS` for each record: the text of the new tokens, up to the first stop string."""
        requests = [_request(record, self.stop_ids) for record in records]
        longest = max(len(request.prompt) + request.config.max_new_tokens for request in requests)
        engine = Engine(
            model.model,
            model.tokenizer,
            slots=len(requests),
            max_length=min(longest, model.model.config.max_seq_len),
            max_waiting=len(requests),
        )
        handles = [engine.submit(request) for request in requests]
        engine.run()
        for handle in handles:
            if handle.error is not None:
                raise handle.error
        # The harness reads the new tokens without their prompt, so that SentencePiece's first space is left out.
        texts = [model.tokenizer.decode(handle.choices[0].ids) for handle in handles]
        return [{"text": cut(text, record["until"])} for text, record in zip(texts, records, strict=True)]


def _request(record: Record, stop_ids: frozenset[int]) -> Request:
    config = {name: record[name] for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    return Request(
        prompt=record["prompt"],
        config=GenerationConfig(**config),
        top_k=record["top_k"],
        stop_ids=stop_ids,
        stop=record["until"],
        repeat=record["repeat"],
    )


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of any stop strings."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def request_order(record: Record) -> tuple[int, list[int]]:
    """The order in which requests are spread over workers: longest first, and equal contexts beside one another."""
    ids = record["context"] if "context" in record else record["prompt"]
    return -len(ids), ids
