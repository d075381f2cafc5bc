"""Decide whether an attack's own equations determine the image: the one meaning of `exact` in every diagnostics.

`exact` is a claim about the equations, made without the image. It needs all of

1. full rank: as many singular values above the rounding of the leak as there are unknowns;
2. equations left over that hold, up to that rounding: noise, a mixture of images or a wrong model break them;
3. a predicted error below CERTAIN: the rounding and the misfit that are there, through the inverse of the system.

Places count: where patches share what tells their place, as those that MJP hides do, their order is in no gradient, and
what can be said is `exact_up_to_order` (`claim`). Images of a batch have no order to begin with.

The rounding is that of the numbers in the leak, not of the arithmetic of the attack: gradients computed in float32 stay
float32 gradients when they are stored, or solved, in float64.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CERTAIN = 1e-3  # predicted root mean square error of a pixel (range 1) below which nothing is left open: 60 dB
# Relative misfit of linear equations, in units of the leak's rounding, above which more than rounding is in it. Sums
# over the tokens of a ViT come to 1 or 2, whatever its depth and width.
MISFIT = 16.0
OFF = 12.0  # times its predicted error, how far a token was ever off: 10.1 (S/32, three photographs, single precision)
# The same in single precision where tokens are not told apart, and what fits may be a mixture of them. Furthest seen:
# 266 by `joint`, 140 by `first_block` (grey patches of little texture).
MIXED = 50 * OFF
MARGIN = 2.0  # times the size of an error, as far as what is left over may understate it
FORMATS = (torch.bfloat16, torch.float16, torch.float32)  # the coarsest first


def rounding(gradients: Iterable[Tensor]) -> float:
    """Return the relative rounding of the coarsest of these tensors: the machine epsilon of the least precise floating
    point format that holds all its values, whatever format it is stored in. Tensors of zeros say nothing."""
    return max((_epsilon(value) for value in gradients if value.any()), default=torch.finfo(torch.float64).eps)


def _epsilon(value: Tensor) -> float:
    for form in FORMATS:
        if value.to(form).to(value.dtype).equal(value):
            return torch.finfo(form).eps
    return torch.finfo(value.dtype).eps


def numerical_rank(values: Tensor, size: int, eps: float) -> int:
    """Return how many singular values (descending) stand out of rounding `eps` in a matrix whose longer side is `size`.

    Independent errors eps * |entry| in a matrix have a largest singular value of at most about eps * sqrt(size) times
    that of the matrix.
    """
    return int((values > eps * size**0.5 * values[0]).sum()) if len(values) else 0


def is_exact(*, rank: int, unknowns: int, misfit: float, error: float, eps: float, limit: float = MISFIT) -> bool:
    """Return whether equations determine their unknowns. misfit: relative, of the equations left over (NaN without
    any); error: predicted, of a pixel (range 1); limit: times eps, what misfit rounding can explain."""
    return rank == unknowns and misfit <= limit * eps and error < CERTAIN


def beyond_rank(values: Tensor, rank: int, shape: Sequence[int]) -> float:
    """Return how far a matrix of a shape is from rank `rank`, by its singular values (descending): the square root of
    what lies beyond over all, per degree of freedom; 0 where matrices of that shape have no higher rank.

    The gradient of a linear layer has the rank of the tokens it read, up to rounding: more is noise.
    """
    if min(shape) <= rank:
        return 0.0
    free = (shape[0] - rank) * (shape[1] - rank) / (shape[0] * shape[1])
    return float((values[rank:].square().sum() / values.square().sum() / free).sqrt())


def claim(*, patches: bool, places: bool) -> dict[str, bool]:
    """Return what an attack claims, for its diagnostics. patches: equations determine all of them, as `is_exact` has
    it; places: and where each stands, hidden ones included."""
    return {"exact": patches and places, "exact_up_to_order": patches}


@dataclass(frozen=True)
class Solution:
    """The solution (n, P) of a linear system of least norm. rank: numerical, at the rounding of the leak; residual:
    |A X - B| / |B|; misfit: the larger of that and its value with every equation at its own scale, per equation left
    over, NaN without any; error: predicted root mean square error of an entry of the solution; reach (n,): the largest
    error of an entry of each row: |a_i| |R|, with a_i the row of the inverse and R the error of a right side, whatever
    its direction (Cauchy-Schwarz), taken as MARGIN times what is left over of the worst right side."""

    values: Tensor
    rank: int
    residual: float
    misfit: float
    error: float
    reach: Tensor


def solve(system: Tensor, right: Tensor, eps: float, *, balance: bool = True, idle: int = 0) -> Solution:
    """Solve system (D, n) X = right (D, P), float64 of relative rounding eps, in the sense of least squares.

    idle: how many of the equations hold whatever X is, and so confirm nothing. balance: weigh each equation by one over
    the size of the terms it sums, to which its rounding is proportional; for equations that are wrong by rounding
    alone. Equations without terms say nothing of X and get weight 0; what stands on their right side still counts as
    misfit.
    """
    terms = system.abs().sum(dim=1)
    weights = (1 / terms if balance else torch.ones_like(terms)).where(terms > 0, 0)[:, None]
    weighted, goal = system * weights, right * weights
    left, values, axes = torch.linalg.svd(weighted, full_matrices=False)
    rank = numerical_rank(values, max(system.shape), eps)
    left, values, axes = left[:, :rank], values[:rank], axes[:rank]

    def least(rest: Tensor) -> Tensor:
        return axes.T @ ((left.T @ rest) / values[:, None])

    found = least(goal)
    found = found + least(goal - weighted @ found)  # once refined, its own rounding is below the leak's
    rest = goal - weighted @ found
    residual = float((right - system @ found).norm() / right.norm())
    freedom = int((terms > 0).sum()) - idle - rank
    misfit = float("nan")
    if freedom > 0:
        misfit = max(residual, float(rest.norm() / goal.norm())) * (len(system) / freedom) ** 0.5
    # Variance of an entry on the right side: as what is left over shows, and never less than its rounding.
    entries = max(freedom, 1) * goal.shape[1]
    variance = max(float(rest.square().sum()) / entries, eps**2 * float(goal.square().mean()))
    error = (variance * float(values.reciprocal().square().sum()) / system.shape[1]) ** 0.5
    left_over = float(rest.square().sum(dim=0).max()) / max(freedom, 1)
    worst = max(left_over, eps**2 * float(goal.square().mean(dim=0).max()))
    reach = MARGIN * (worst * len(system) * (axes.T / values).square().sum(dim=1)).sqrt()
    return Solution(found, rank, residual, misfit, error, reach)
