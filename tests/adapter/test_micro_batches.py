import random

import pytest

from adapter.micro_batches import micro_batches


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
