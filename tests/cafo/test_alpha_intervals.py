"""The intervals of α of single images, and what follows from several, on numbers that are written by hand."""

import math

import pytest
import torch

from cafo.alpha_intervals import (
    accuracy_steps,
    alone_intervals,
    best_alpha,
    correct_intervals,
    count_correct_at,
    label_margins,
)

INF = math.inf


def steps(*intervals):
    """The breakpoints and counts of one set of intervals, without breakpoints that start no step."""
    breakpoints, correct = accuracy_steps(*torch.tensor(intervals).T[:, None])
    following = [*breakpoints[0, 1:].tolist(), INF]
    each = zip(breakpoints[0].tolist(), following, correct[0].tolist(), strict=True)
    return [(start, count) for start, stop, count in each if start < stop]


def best(*intervals):
    count, alpha = best_alpha(*accuracy_steps(*torch.tensor(intervals, dtype=torch.float64).T[:, None]))
    return int(count), float(alpha)


@pytest.mark.parametrize(
    ("base", "term", "label", "expected"),
    [
        ([2.0, 0.0, 1.0], [3.0, 1.0, 2.0], 0, (0, INF)),  # ahead, and more so
        (
            [0.0, 2.0, 1.0],
            [2.0, 1.0, 0.0],
            0,
            (2, INF),
        ),  # behind two, and catches up with the first at 2, the other 0.5
        ([2.0, 0.0, 1.0], [0.0, 1.0, 2.0], 0, (0, 0.5)),  # overtaken by the last class at 0.5, by the other at 2
        ([1.0, 2.0, 0.0], [1.0, 0.0, 1.25], 0, (1, 4)),  # overtakes one at 1, and is overtaken by the other at 4
        ([0.0, 2.0, 1.0], [1.0, 1.0, 0.0], 0, (INF, INF)),  # never catches up with the first
        ([0.0, 2.0, 1.0], [0.0, 1.0, 0.0], 0, (INF, INF)),
    ],
)
def test_the_interval_is_between_the_last_catching_up_and_the_first_overtaking(base, term, label, expected):
    base, term, labels = torch.tensor([base]), torch.tensor([term]), torch.tensor([label])
    low, high = correct_intervals(label_margins(base, labels), term, labels)
    assert (float(low), float(high)) == pytest.approx(expected)


def test_a_tie_is_won_against_a_later_class():
    margins = label_margins(torch.tensor([[1.0, 1.0, 1.0, 3.0]] * 2), torch.tensor([1, 3]))
    assert (margins > 0).tolist() == [[False, True, True, False], [True, True, True, True]]
    assert margins[0, 3] == -2


def test_without_a_base_the_largest_term_is_right_at_every_alpha_and_the_first_of_equal_ones():
    term, labels = torch.tensor([[1.0, 2.0, 2.0]] * 3), torch.tensor([0, 1, 2])
    low, high = alone_intervals(label_margins(torch.zeros(3, 3), labels), term, labels)
    assert (low < 1e-30).tolist() == [False, True, False]
    assert (low > 0).all()
    assert high.tolist() == [INF] * 3


def test_leading_axes_are_as_many_problems():
    base, term = torch.randn(2, 3, 2, 11, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(11) % 5
    margins, ties = label_margins(base, labels), label_margins(torch.zeros_like(base), labels)
    together = [*correct_intervals(margins, term, labels), *alone_intervals(ties, term, labels)]
    for i, j in ((0, 0), (1, 1), (2, 0)):
        assert torch.equal(margins[i, j], label_margins(base[i, j], labels))
        alone = [
            *correct_intervals(margins[i, j], term[i, j], labels),
            *alone_intervals(ties[i, j], term[i, j], labels),
        ]
        assert all(torch.equal(one[i, j], other) for one, other in zip(together, alone, strict=True))


def test_counts_at_some_alphas_are_those_of_argmax():
    rng = torch.Generator().manual_seed(0)
    base, term = torch.randn(2, 53, 7, generator=rng)
    base[:20] = base[:20].round()  # ties
    labels, alphas = torch.randint(7, (53,), generator=rng), [0.0, 0.1, 0.7, 2.0, 30.0]
    expected = [int(((base + alpha * term).argmax(1) == labels).sum()) for alpha in alphas]
    assert count_correct_at(torch.tensor(alphas), base, term, labels).tolist() == expected
    assert len(set(expected)) > 2


def test_the_steps_rise_and_fall_at_the_ends_of_the_intervals():
    assert steps((0.0, 2.0), (1.0, INF), (3.0, 4.0)) == [(0, 1), (1, 2), (2, 1), (3, 2), (4, 1)]
    assert steps((INF, INF), (5.0, 5.0), (6.0, 4.0)) == [(0, 0)]
    assert steps((1.0, 2.0), (1.0, 2.0), (2.0, 3.0)) == [(0, 0), (1, 2), (2, 1), (3, 0)]


def test_the_best_alpha_is_in_the_middle_of_the_first_best_step():
    assert best((0.0, 2.0), (1.0, 7.0), (3.0, 4.0)) == (2, 1.5)
    assert best((2.0, 10.0), (5.0, 5.0), (7.0, 6.0)) == (1, 6.0)
    assert best((0.0, 3.0), (5.0, 6.0)) == (1, 0.0)
    assert best((4.0, INF), (INF, INF)) == (1, 9.0)
    assert best((INF, INF), (3.0, 2.0)) == (0, 0.0)


@pytest.mark.parametrize("start", [0.5, 1.0, 40.0])
def test_a_step_that_float32_may_not_hit_is_not_taken(start):
    least = 1e-5 * (1 + start)
    assert best((start, start + 0.9 * least), (start, INF))[0] == 1
    count, alpha = best((start, start + 1.1 * least), (start, INF))
    assert (count, alpha) == (2, pytest.approx(start + 0.55 * least, rel=1e-12))
