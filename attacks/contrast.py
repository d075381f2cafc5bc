"""Look whether a reconstruction has the contrast of the private image, by the first layer of the first block.

Equations of the patch projection alone hold for a picture of another contrast where the client scaled the gradient of
that one tensor, as clipping each tensor for itself does. The next layer tells them apart whatever its own scale: its
gradient is sum_t delta_t n_t^T, so each row lies in the span of the inputs n_t, and behind a LayerNorm those turn as
the contrast changes. What lies outside the span is smallest at the contrast of the image itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 1e-2  # relative change of contrast at which the misfit is looked at


class Contrast(NamedTuple):
    """misfit: share of the gradient outside the span of the layer's inputs, by norm; factor: the contrast, relative to
    the reconstruction's, where that is smallest: of a parabola through three values, NaN where it has no minimum."""

    misfit: float
    factor: float


def measure_contrast(gradient: Tensor, inputs: Callable[[float], Tensor]) -> Contrast | None:
    """Measure the contrast of a reconstruction; None where nothing can be said: a gradient of zero, or inputs that span
    all there is (behind a LayerNorm, whose channels may sum to zero, one dimension less).

    Args:
        gradient: of the layer's weight (m, D), in float64.
        inputs: what the layer reads (T, D) of the reconstruction at a contrast, times its own.
    """
    size = gradient.norm()
    if not size or len(inputs(1.0)) + 1 >= gradient.shape[1]:
        return None
    below, at, above = (_outside(gradient / size, inputs(factor)) ** 2 for factor in (1 - STEP, 1.0, 1 + STEP))
    curvature = below - 2 * at + above
    factor = 1 + STEP * (below - above) / (2 * curvature) if curvature > 0 else float("nan")
    return Contrast(at**0.5, factor)


def _outside(rows: Tensor, inputs: Tensor) -> float:
    basis = torch.linalg.qr(inputs.T).Q  # (D, T)
    return float((rows - (rows @ basis) @ basis.T).norm())
