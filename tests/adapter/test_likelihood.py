"""Likelihoods of continuations are those of each row alone, whatever else is in the batch."""

import pytest
import torch

from adapter import likelihood
from adapter.adaption import AdaptionConfig
from adapter.errors import AdapterError
from adapter.likelihood import likelihoods
from tests.adapter.models import GQA, llama, tokens

WINDOW = GQA["max_seq_len"]


def alone(model, context, continuation):
    """By a loop over the logits of one row."""
    log_p = model(torch.tensor([context + continuation[:-1]]))[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    total = sum(log_p[place, id].item() for place, id in zip(places, continuation, strict=True))
    return total, all(log_p[place].argmax() == id for place, id in zip(places, continuation, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("adaption", [None, AdaptionConfig(n_layers=2, prompt_length=3)], ids=["base", "adapter"])
def test_likelihoods_are_those_of_each_row_alone(adaption, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK_ROWS", 4)  # a row's labels lie in several chunks, and share some
    model = llama(GQA, adaption)
    shared, other = tokens(1, 11)[0].tolist(), tokens(1, 29, seed=1)[0].tolist()
    likeliest = model(torch.tensor([shared]))[0, -1].argmax().item()
    options = [[5], [7], [likeliest], [likeliest, 3, 5], [5, 7, 9, 2, 11, 13], [5]]
    pairs = [*((shared, option) for option in options), (other, [1, 2]), (shared[:1], [8, 8])]
    pairs.append((tokens(1, WINDOW, seed=2)[0].tolist(), [4]))  # the last one is not read, so it may stand outside
    found = likelihoods(model, *map(list, zip(*pairs, strict=True)))
    for (context, continuation), one in zip(pairs, found, strict=True):
        total, greedy = alone(model, context, continuation)
        assert one.log_likelihood == pytest.approx(total, abs=1e-4)
        assert one.greedy == greedy
    assert found[0] == found[5]
    assert [one.greedy for one in found[:3]] == [False, False, True]


def test_what_cannot_be_scored_is_refused():
    model = llama(GQA)
    assert likelihoods(model, [], []) == []
    for contexts, continuations, message in [
        ([[1]], [], "1 contexts for 0 continuations"),
        ([[1], []], [[2], [3]], "row 1: a context and a continuation need a token each, got 0, 1"),
        ([[1]], [[]], "got 1, 0"),
        ([[1] * WINDOW], [[2, 3]], f"row 0: {WINDOW} tokens of context and 2 .* window of {WINDOW}"),
    ]:
        with pytest.raises(AdapterError, match=message):
            likelihoods(model, contexts, continuations)
