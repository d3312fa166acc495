import random

import pytest
import torch

from adapter.batching import collate, micro_batches
from adapter.loss import IGNORE


@pytest.mark.parametrize("token_budget", [1, 7, 64, 101, 2048])
def test_every_index_once_and_within_the_budget(token_budget):
    lengths = [random.Random(token_budget).randint(1, 101) for _ in range(53)]
    batches = micro_batches(lengths, token_budget)
    assert sorted(i for batch in batches for i in batch) == list(range(53))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= token_budget


def test_neighbours_in_length_share_a_micro_batch_longest_first():
    assert micro_batches([2, 9, 3, 10, 2, 3], 20) == [[3, 1], [2, 5, 0, 4]]


def test_equal_lengths_keep_their_order():
    assert micro_batches([5, 5, 5, 5, 5], 10) == [[0, 1], [2, 3], [4]]


def test_an_example_longer_than_the_budget_is_alone():
    assert micro_batches([3, 50, 4], 8) == [[1], [2, 0]]


def test_examples_of_one_token_and_of_none_share_a_micro_batch():
    assert micro_batches([1, 1, 0, 1], 3) == [[0, 1, 3], [2]]
    assert micro_batches([0, 0], 1) == [[0], [1]]


def test_nothing_gives_nothing():
    assert micro_batches([], 8) == []


@pytest.mark.parametrize("token_budget", [0, -5])
def test_a_budget_below_one_is_an_error(token_budget):
    with pytest.raises(ValueError, match=f"token_budget must be at least 1, got {token_budget}"):
        micro_batches([1, 2], token_budget)


def test_collate_pads_on_the_right_and_labels_the_spans():
    tokens, labels = collate([[5, 6, 7, 9, 3], [8]], [[(1, 2), (3, 5)], [(0, 1)]])
    assert torch.equal(tokens, torch.tensor([[5, 6, 7, 9, 3], [8, 0, 0, 0, 0]]))
    assert torch.equal(labels, torch.tensor([[IGNORE, 6, IGNORE, 9, 3], [8, *[IGNORE] * 4]]))
    tokens, labels = collate([[5, 6]], [[]])
    assert torch.equal(tokens, torch.tensor([[5, 6]]))
    assert torch.equal(labels, torch.full((1, 2), IGNORE))


def test_collate_of_nothing_is_one_row_of_padding():
    tokens, labels = collate([], [])
    assert tokens.tolist() == [[0]]
    assert labels.tolist() == [[IGNORE]]


def test_collate_refuses_spans_of_other_sequences():
    with pytest.raises(ValueError, match="shorter"):
        collate([[5, 6], [7]], [[(0, 1)]])
