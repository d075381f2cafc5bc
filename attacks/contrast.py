"""Look whether a reconstruction made the gradient of the first layer of the first block: contrast, places, pixels.

Equations of the patch projection alone hold for a picture of another contrast where the client scaled the gradient of
that one tensor, as clipping each tensor for itself does. The next layer tells them apart whatever its own scale: its
gradient is sum_t delta_t n_t^T, so each row lies in the span of the inputs n_t, and behind a LayerNorm those turn as
the contrast changes. What lies outside the span is smallest at the contrast of the image itself.

The same holds for patches in other places, or read in another order of rows and columns: the equations of the patch
projection hold there too, and the tokens are others. What lies outside their span is then more than the noise of that
gradient and the predicted error of the picture explain.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attacks.exactness import beyond_rank

STEP = 1e-2  # relative change of contrast at which the misfit is looked at


class Contrast(NamedTuple):
    """misfit: share of the gradient outside the span of the layer's inputs, by norm; factor: the contrast, relative to
    the reconstruction's, where that is smallest: of a parabola through three values, NaN where it has no minimum;
    noise: the misfit by what the gradient holds beyond its rank; moved: the misfit by the predicted error."""

    misfit: float
    factor: float
    noise: float
    moved: float


def measure_contrast(gradient: Tensor, inputs: Callable[[float], Tensor], near: Tensor) -> Contrast | None:
    """Measure the contrast of a reconstruction; None where nothing can be said: a gradient of zero, or inputs that span
    all there is (behind a LayerNorm, whose channels may sum to zero, one dimension less).

    Args:
        gradient: of the layer's weight (m, D), in float64.
        inputs: what the layer reads (T, D) of the reconstruction at a contrast, times its own.
        near: what it reads of a picture that is off by the predicted error.
    """
    size, found = gradient.norm(), inputs(1.0)
    if not size or len(found) + 1 >= gradient.shape[1]:
        return None
    below, at, above = (_outside(gradient / size, inputs(factor)) ** 2 for factor in (1 - STEP, 1.0, 1 + STEP))
    curvature = below - 2 * at + above
    factor = 1 + STEP * (below - above) / (2 * curvature) if curvature > 0 else float("nan")
    noise = beyond_rank(torch.linalg.svdvals(gradient), len(found), gradient.shape)
    weights = torch.linalg.lstsq(found.T, gradient.T / size, driver="gelsd").solution.T  # (m, T): what came back
    return Contrast(at**0.5, factor, noise, _outside(weights @ (near - found), found))


def _outside(rows: Tensor, inputs: Tensor) -> float:
    basis = torch.linalg.qr(inputs.T).Q  # (D, T)
    return float((rows - (rows @ basis) @ basis.T).norm())
