"""Log-likelihoods of continuations, for multiple choice and perplexity: many continuations in one pass of a decoder.

Rows that begin alike share the states of their common tokens (`adapter.packing`), so the options of a question, and
the examples before it, are computed once. The head runs once for each token that predicts anything, however many
options follow it.

p predicting tokens, C width, m continued tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from adapter.batching import collate
from adapter.decoder import Decoder
from adapter.errors import AdapterError
from adapter.loss import CHUNK_ROWS
from adapter.packing import pack


class Likelihood(NamedTuple):
    """The score of one continuation by a model."""

    log_likelihood: float
    """log p(continuation | context) in nats, summed over the continuation's tokens."""
    greedy: bool
    """True if each token of the continuation is the likeliest one at its place."""


@torch.no_grad()
def likelihoods(
    model: Decoder, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """The likelihood of each continuation after its context, both as token ids.

    A context and its continuation, without the continuation's last token, are to fit the model's window.

    Raises AdapterError for another number of contexts than of continuations, for one of either that is empty, and for
    a pair that is too long.
    """
    if len(contexts) != len(continuations):
        raise AdapterError(f"{len(contexts)} contexts for {len(continuations)} continuations: give one to each")
    if not contexts:
        return []
    for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        _check(row, len(context), len(continuation), model.config.max_seq_len)
    rows = [[*context, *continuation] for context, continuation in zip(contexts, continuations, strict=True)]
    spans = [[(len(context), len(row))] for context, row in zip(contexts, rows, strict=True)]
    device = model.tok_embeddings.weight.device
    packing = pack(*collate(rows, spans)).to(device)
    hidden = model.hidden_states(packing.tokens, packing=packing)  # (p, C)
    m = len(packing.targets)
    predicting = torch.arange(m, device=device) if packing.labelled is None else packing.labelled  # (m,)
    log_likelihood = torch.empty(m, dtype=torch.float64, device=device)
    greedy = torch.empty(m, dtype=torch.bool, device=device)
    for start in range(0, len(hidden), CHUNK_ROWS):
        log_p = model.output(hidden[start : start + CHUNK_ROWS]).float().log_softmax(-1)  # (CHUNK_ROWS, V)
        here = ((predicting >= start) & (predicting < start + CHUNK_ROWS)).nonzero().squeeze(1)
        at, targets = predicting[here] - start, packing.targets[here]
        log_likelihood[here] = log_p[at, targets].double()
        greedy[here] = log_p.argmax(-1)[at] == targets
    counts = [len(continuation) for continuation in continuations]
    parts = zip(log_likelihood.cpu().split(counts), greedy.cpu().split(counts), strict=True)
    return [Likelihood(values.sum().item(), bool(hits.all())) for values, hits in parts]


def _check(row: int, context: int, continuation: int, window: int) -> None:
    """Raise AdapterError for a context and a continuation, of so many tokens, that cannot be scored."""
    if not context or not continuation:
        raise AdapterError(f"row {row}: a context and a continuation need a token each, got {context}, {continuation}")
    if context + continuation - 1 > window:
        raise AdapterError(
            f"row {row}: {context} tokens of context and {continuation} of continuation do not fit the base's window "
            f"of {window}: cut the context from its left"
        )
