"""Exact intervals, areas, and rates that a small pool cannot show."""

import pytest
import torch
from scipy.stats import binom

from eval.membership import auc, binomial_interval, tpr_at_fpr
from utils.errors import UserError


@pytest.mark.parametrize("hits, number", [(0, 10), (3, 10), (10, 10), (1, 1)])
def test_intervals_are_those_of_the_binomial_distribution(hits, number):
    low, high = binomial_interval(hits, number)
    assert low == 0 if hits == 0 else binom.sf(hits - 1, number, low) == pytest.approx(0.025)
    assert high == 1 if hits == number else binom.cdf(hits, number, high) == pytest.approx(0.025)


def test_rates_count_members_below_all_but_a_share_of_the_others():
    others = torch.arange(1.0, 101.0)
    rate = tpr_at_fpr(torch.tensor([0.5, 1.5, 2.5, 50.0]), others, 0.01)
    assert rate.value == 0.5 and rate.n == 4 and rate.low < 0.5 < rate.high
    assert tpr_at_fpr(torch.tensor([0.5, 1.5, 2.5, 50.0]), others, 0.5).value == 1.0


@pytest.mark.parametrize(
    "members, others, rate, words",
    [
        (3, 9_999, 1e-4, "9999 non-members cannot show a false positive rate of 0.0001: give 10000 or more"),
        (0, 100, 0.1, "needs one member or more"),
        (3, 100, 0.0, "lies between 0 and 1, got 0"),
    ],
)
def test_pools_that_are_too_small_are_refused(members, others, rate, words):
    with pytest.raises(UserError) as error:
        tpr_at_fpr(torch.zeros(members), torch.ones(others), rate)
    assert words in str(error.value)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    members, others = torch.tensor([1.0, 3.0, 3.0]), torch.tensor([2.0, 3.0, 4.0, 5.0])
    pairs = [1.0 if one < other else 0.5 * (one == other) for one in members for other in others]
    assert auc(members, others) == pytest.approx(float(sum(pairs)) / 12)
