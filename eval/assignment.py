"""Linear assignment: which reconstruction belongs to which image, and which patch to which.

The mean gradient of a batch does not depend on the order of its images, and the gradient of masked patches that share
one position embedding not on theirs. An attack is therefore scored after the one-to-one pairing of least total error;
the best match for each on its own, which counts one lucky image several times, would inflate the scores.
"""

import scipy
import torch
from torch import Tensor

from models.jigsaw import patchify


def assign(rows: Tensor, targets: Tensor) -> Tensor:
    """Return order (N,) int64 with rows (M, P), M >= N, assigned to targets (N, P) at the least total squared error.

    rows[order[i]] is the partner of targets[i]. Rows that hold NaN or infinity are further from every target than any
    finite row.
    """
    a, b = targets.double().cpu(), rows.double().cpu()
    cost = a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)
    finite = cost.isfinite()
    farthest = cost[finite].max() if finite.any() else 0.0
    return torch.from_numpy(scipy.optimize.linear_sum_assignment(cost.where(finite, 2 * farthest + 1).numpy())[1])


def match_batch(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return order (B,) int64 that puts a batch into the order of its targets: reconstruction[order] beside target.

    Both (B, C, H, W) pixel values; the reconstruction is clamped to [0, 1] as it is for the scores. Cost: the MSE.
    """
    return assign(reconstruction.clamp(0, 1).flatten(1), target.flatten(1))


def order_free_error(reconstruction: Tensor, target: Tensor, patch_size: int, chosen: Tensor) -> list[Tensor]:
    """Return per image the MSE (k,) float64 of its chosen patches, each against the patch assigned to it.

    reconstruction, target (B, C, H, W); chosen (B, N) bool: the patches compared as a set, k of them in that image.
    """
    patches = zip(patchify(reconstruction, patch_size).double(), patchify(target, patch_size).double(), strict=True)
    pairs = ((found[keep], true[keep]) for (found, true), keep in zip(patches, chosen, strict=True))
    return [(found[assign(found, true)] - true).square().mean(1) for found, true in pairs]
