"""Group examples into micro-batches by length, under a budget of tokens.

Alpaca's examples are about 100 tokens long on average, not 512, so padding to a fixed length would be most of the cost.
Examples of similar length therefore share a micro-batch. How a global batch is split does not change its gradient:
losses are sums over labels, divided by the label count of the whole global batch.

Tasks of Ray Data import this module, so it does not import torch, which takes seconds.
"""

from collections.abc import Sequence

from adapter.errors import AdapterError


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
