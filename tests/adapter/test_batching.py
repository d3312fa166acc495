import pytest
import torch

from adapter.batching import collate
from adapter.loss import IGNORE


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
