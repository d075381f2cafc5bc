"""Levenberg-Marquardt for many small nonlinear least-squares problems at once: each has its own damping.

Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963: the damping is scaled by
the diagonal of the normal matrix, lowered after a step that helps and raised after one that does not.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from utils.progress import tell

LOWER, RAISE = 1 / 3, 4.0
DAMPING = (1e-12, 1e6)  # above: no step helps any more
PROGRESS = 1e-3  # a step that lowers the sum of squares by less of it is the last
CHUNK = 64  # problems whose derivatives are held at once


@torch.no_grad()
def levenberg_marquardt(
    residual: Callable[[Tensor, Tensor], Tensor], start: Tensor, given: Tensor, steps: int, tolerance: float = 1e-26
) -> tuple[Tensor, Tensor]:
    """Minimise |residual(x, g)|^2 from every row x of start (V, n) with its row g of given (V, m).

    residual: (n,), (m,) -> (k,). Returns the points (V, n) and their sums of squares (V,), after `steps` trials each,
    below `tolerance`, or where steps no longer help. Never above where it started.
    """
    values, jacobian = vmap(residual), vmap(jacfwd(residual), chunk_size=CHUNK)
    x, square = start.clone(), values(start, given).square().sum(dim=1)
    damping = torch.full_like(square, 1e-2)
    active = torch.arange(len(x))
    for step in range(steps):
        tell("Levenberg-Marquardt, step", step, steps)
        here, fixed = x[active], given[active]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's forward mode uses what torch itself deprecates
            slope, error = jacobian(here, fixed), values(here, fixed)
        normal = slope.mT @ slope
        scale = damping[active, None] * normal.diagonal(dim1=1, dim2=2) + 1e-14
        trial = here - torch.linalg.solve(normal + torch.diag_embed(scale), (slope.mT @ error[..., None])[..., 0])
        new, old = values(trial, fixed).square().sum(dim=1), square[active]
        better = new < old  # False for NaN
        x[active] = torch.where(better[:, None], trial, here)
        square[active] = torch.where(better, new, old)
        damping[active] *= torch.where(better, LOWER, RAISE)
        rests = (better & (old - new < PROGRESS * old)) | (square[active] < tolerance) | (damping[active] > DAMPING[1])
        damping.clamp_(*DAMPING)
        active = active[~rests]
        if not len(active):
            break
    return x, square
