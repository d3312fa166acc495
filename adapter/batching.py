"""Build micro-batches: group examples by length under a token budget, and pad them into tensors.

Alpaca's examples are about 100 tokens long on average, not 512, so padding to a fixed length would be most of the cost.
Examples of similar length therefore share a micro-batch. How a global batch is split does not change its gradient:
losses are sums over labels, divided by the label count of the whole global batch.

B rows, T tokens of the longest row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter.errors import AdapterError
from adapter.loss import IGNORE


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split examples of the given lengths into micro-batches of at most `token_budget` tokens, padding included.

    Returns lists of indices into `lengths`; every index appears once. The longest examples come first, so that memory
    peaks, or runs out, on the first micro-batch and not in the middle of an epoch. An example longer than the budget is
    alone in its micro-batch.

    Raises AdapterError for a budget below 1.
    """
    if token_budget < 1:
        raise AdapterError(f"token_budget must be at least 1, got {token_budget}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    while order:
        count = max(1, token_budget // max(1, lengths[order[0]]))  # all are padded to the first, which is the longest
        batches.append(order[:count])
        order = order[count:]
    return batches


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
