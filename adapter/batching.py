"""Micro-batches by length, under a token budget: Alpaca's examples are about 100 tokens long, not 512.

Padding is what a batch costs beyond its tokens, so neighbours in length share a micro-batch. How a global batch is cut
does not change its gradient: losses are sums over labels, divided by the label count of the whole batch.
"""

from collections.abc import Sequence

from adapter.errors import AdapterError


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cuts examples of the given lengths into micro-batches of at most `token_budget` tokens, padding included.

    Returns lists of indices into `lengths`; every index appears once. Longest first, so that memory peaks, or runs out,
    on the first micro-batch and not in the middle of an epoch. An example longer than the budget is alone in its
    micro-batch.

    Raises ValueError for a budget below 1.
    """
    if token_budget < 1:
        raise AdapterError(f"token_budget must be at least 1, got {token_budget}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cut: list[list[int]] = []
    while order:
        count = max(1, token_budget // max(1, lengths[order[0]]))  # all are padded to the first, the longest
        cut.append(order[:count])
        order = order[count:]
    return cut
