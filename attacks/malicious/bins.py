"""Bins of a linear functional: how a malicious layer keeps the images of a sum apart.

A row k of a layer reads h = w . x and is active from a threshold c_k on. Its gradient is a sum over images,
dL/dw_k = sum_n d_n a_k(h_n) x_n and dL/db_k = sum_n d_n a_k(h_n), with a_k = 1 where the row is active. Neighbouring
rows differ by the images between their thresholds alone, and where that is one image the ratio of the two differences
is this image. With bins of probability p_k an image shares its bin with none of the n - 1 others with probability
sum_k p_k (1 - p_k)^(n - 1). Thresholds are estimated from public pictures, which makes the p_k uneven and costs some of
this: `expected_share` has the mean over that too.

Source: Fowl et al., "Robbing the Fed", ICLR 2022 (their count takes all fillings of the bins as equally likely, which
independent images are not; the formula above is that of independent ones).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.special import betaln
from torch import Tensor

from attacks.exactness import rounding

TAIL = 8.0  # standard deviations: below the first threshold lies no image
SLACK = 1e-3  # of the width of a bin: by so much a read value may lie outside it
GRID_ERROR = 0.15  # root mean square distance from whole 8-bit values up to which a picture is one (chance: 0.289)
GRID_LEVELS = 24  # different 8-bit values a picture needs for that to say anything


def expected_share(masses: Sequence[float], images: int, public: int | None = None) -> float:
    """Return the expected share of `images` independent images that are alone in a bin.

    masses: of the bins, which may sum to less than 1. public: thresholds are the quantiles of so many pictures, whose
    bins then have the masses on average only: of m pictures, the mass between two quantiles that a mass p lies between
    has the distribution Beta(p m, m + 1 - p m). None: the masses are exact.
    """
    if public is None:
        return sum(mass * (1 - mass) ** (images - 1) for mass in masses)
    shapes = [(mass * public, public + 1 - mass * public) for mass in masses if mass < 1]
    return sum(math.exp(betaln(a + 1, b + images - 1) - betaln(a, b)) for a, b in shapes)


def thresholds(values: Tensor | None, centre: float, deviation: float, masses: Tensor) -> Tensor:
    """Return (K,) ascending thresholds of K bins of these masses (K,), of sum 1, for a functional.

    values (M,): the functional of public pictures; None: it is taken for normal, of that centre and deviation. The
    first threshold lies below everything.
    """
    edges = torch.cat([masses.new_zeros(1), masses.cumsum(0)[:-1]]).double()  # (K,)
    if values is None:
        inner = [centre + deviation * NormalDist().inv_cdf(float(edge)) for edge in edges[1:]]
        return torch.tensor([centre - TAIL * deviation, *inner], dtype=torch.float64)
    values = values.double()
    found = torch.quantile(values, edges)
    found[0] = values.min() - (values.max() - values.min())
    return found


@dataclass(frozen=True)
class Hits:
    """What the rows of a layer give away. inputs (F, P): the read inputs; values (F,): the functional of each; weights
    (F,): |d_n|, the size of what each image adds; groups (F,) int64: the group of rows each was read from."""

    inputs: Tensor
    values: Tensor
    weights: Tensor
    groups: Tensor


def read_rows(
    weight_gradient: Tensor, bias_gradient: Tensor, functional: Tensor, edges: Tensor, *, cumulative: bool
) -> Hits:
    """Return the inputs of all bins that hold something, from gradients (G, K, P) and (G, K) of G groups of K rows.

    functional (P,); edges (G, K): the lower thresholds, ascending, or all -inf for rows without bins. cumulative: rows
    are active from their threshold on, and bins are differences of rows; else each row is active in its bin alone. A
    bin counts where its ratio, read by the functional, lies between its own thresholds: the mixture of several images
    of one sign does as well, rounding alone does not.
    """
    weight, bias = weight_gradient.double(), bias_gradient.double()
    eps = rounding((weight_gradient, bias_gradient))
    noise = eps * bias.abs().amax(dim=1, keepdim=True) * bias.shape[1] ** 0.5  # (G, 1)
    if cumulative:
        weight = weight - torch.cat([weight[:, 1:], torch.zeros_like(weight[:, :1])], dim=1)
        bias = bias - torch.cat([bias[:, 1:], torch.zeros_like(bias[:, :1])], dim=1)
    filled = bias.abs() > 4 * noise  # (G, K)
    inputs = weight / torch.where(filled, bias, torch.ones_like(bias))[..., None]  # (G, K, P)
    values = inputs @ functional.double()  # (G, K)
    inside = filled
    if edges.isfinite().all():
        upper = torch.cat([edges[:, 1:], torch.full_like(edges[:, :1], math.inf)], dim=1)
        slack = SLACK * (edges[:, -1:] - edges[:, 1:2])
        inside = filled & (values > edges - slack) & (values <= upper + slack)
    groups = torch.arange(len(bias))[:, None].expand_as(bias)
    return Hits(inputs[inside], values[inside], bias[inside].abs(), groups[inside])


def on_grid(pixels: Tensor) -> Tensor:
    """Return (F,) bool: which of (F, P) pixels in [0, 1] are pictures of 8 bits and no mixture of several.

    Decoded pictures hold multiples of 1/255. A mixture of two keeps to them in all of its values by chance alone; one
    with fewer than GRID_LEVELS values proves nothing and is not claimed.
    """
    scaled = pixels.double() * 255
    error = (scaled - scaled.round()).square().mean(dim=1).sqrt()
    range_kept = (scaled > -1).all(dim=1) & (scaled < 256).all(dim=1)
    levels = torch.tensor([len(row.unique()) for row in scaled.round()], device=pixels.device)
    return (error < GRID_ERROR) & range_kept & (levels >= GRID_LEVELS)


def distinct(inputs: Tensor, order: Sequence[int], most: int, tolerance: float = 1e-2) -> list[int]:
    """Return the places of at most `most` rows of inputs (F, P) that differ from all taken before, in this order."""
    taken: list[int] = []
    for place in order:
        if len(taken) == most:
            break
        near = (inputs[taken] - inputs[place]).norm(dim=1) < tolerance * inputs[place].norm() if taken else None
        if near is None or not near.any():
            taken.append(place)
    return taken
