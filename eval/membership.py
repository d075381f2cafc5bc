"""Scores of membership, from distances of members and others (attacks/membership.py).

A rate of false positives is only measured on a pool that is large enough: with n non-members the smallest is 1 / n.
"""

from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from utils.errors import UserError

LEVEL = 0.95  # of the exact intervals (Clopper and Pearson, 1934)


class Rate(NamedTuple):
    """A share k / n with its exact binomial interval. cut: the distance below which a candidate counts."""

    value: float
    low: float
    high: float
    n: int
    cut: float


def binomial_interval(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the exact interval of a share."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def tpr_at_fpr(members: Tensor, others: Tensor, false_positives: float) -> Rate:
    """Return the share of members (k,) whose distance is below that of all but a share of others (M,).

    Raises UserError where the pool of others is too small to have such a rate of false positives, and without members.
    """
    if not len(members):
        raise UserError("a true positive rate needs one member or more")
    if not 0 < false_positives < 1:
        raise UserError(f"a rate of false positives lies between 0 and 1, got {false_positives:g}")
    allowed = int(false_positives * len(others) + 1e-9)
    if allowed < 1:
        least = round(1 / false_positives)
        raise UserError(
            f"{len(others)} non-members cannot show a false positive rate of {false_positives:g}: give {least} or more"
        )
    # As many non-members as are allowed lie strictly below the cut, and members below it count.
    cut = others.sort().values[allowed] if allowed < len(others) else others.new_tensor(torch.inf)
    hits = int((members < cut).sum())
    return Rate(hits / len(members), *binomial_interval(hits, len(members)), len(members), float(cut))


def auc(members: Tensor, others: Tensor) -> float:
    """Return the probability that a member is nearer than a non-member, ties counted half; 0.5 is chance."""
    both = torch.cat([members, others])
    ranks = both.argsort().argsort().double() + 1
    for value in both.unique()[both.unique(return_counts=True)[1] > 1]:  # ties share their mean rank
        ranks[both == value] = ranks[both == value].mean()
    above = len(members) * len(others) + len(members) * (len(members) + 1) / 2 - float(ranks[: len(members)].sum())
    return above / (len(members) * len(others))
