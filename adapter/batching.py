"""Pad a micro-batch into tensors: B rows, T tokens of the longest row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter.loss import IGNORE


def pad(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Pad sequences of ids on the right to the length of the longest, (B, T) int64.

    Padding is 0. No real token attends to it, so which id it is does not matter.
    """
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def collate(
    sequences: Sequence[Sequence[int]], label_spans: Sequence[Sequence[Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Pad sequences of ids (see `pad`) and label them. Returns tokens and labels, each (B, T) int64.

    label_spans: the (first, one past the last) tokens of each sequence that are labelled; all others, and padding, get
    IGNORE. Without any sequence the result is one row of padding, which a worker runs to keep in step.
    """
    tokens = pad(sequences) if sequences else torch.zeros(1, 1, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE)
    for row, (ids, spans) in enumerate(zip(sequences, label_spans, strict=True)):
        for start, end in spans:
            labels[row, start:end] = torch.tensor(ids[start:end])
    return tokens, labels
