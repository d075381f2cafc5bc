"""The two scores of ATS, both without training a model under the policy.

Privacy (lower is more private): how well the gradient of a picture on the way from noise to the transformed image
points to the gradient of that image; a flat way leaves an attacker without direction. Accuracy (higher is better): how
different the derivatives of an untrained network are from image to image (Mellor et al., "Neural Architecture Search
without Training", ICML 2021). Source: Gao et al., CVPR 2021, sections 3.2 and 3.3.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import not_empty

STEPS = 20  # intervals on the way from noise to the image
SMALL = 1e-5


def gradient_rows(model: nn.Module, images: Tensor, labels: Tensor, scale: float = 1.0) -> list[list[Tensor]]:
    """Return per image the gradient of `scale` times its cross-entropy by every parameter tensor the loss reaches."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = scale * nn.functional.cross_entropy(model(image[None]), label[None])
        rows.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    return [[part for part in row if part is not None] for row in rows]


def similarity(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the mean over the tensors of the cosine between two gradients, each tensor counting the same; a scalar."""
    pairs = zip(one, other, strict=True)
    return torch.stack([nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]).mean()


def privacy_curve(model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, scale: float = 1.0) -> Tensor:
    """Return (B, 21): similarity along the way (1 - t) noise + t image, t = 0, 1/20, ..., 1, the true label throughout.

    images and noise (B, C, H, W) normalised, labels (B,); the model in evaluation mode, semi-trained. scale: factor of
    the loss (the official code halves it, which no cosine sees).
    """
    goals, points = gradient_rows(model, images, labels, scale), []
    for step in range(STEPS + 1):
        mixed = noise + (images - noise) * (step / STEPS)
        rows = gradient_rows(model, mixed, labels, scale) if step < STEPS else goals
        points.append(torch.stack([similarity(row, goal) for row, goal in zip(rows, goals, strict=True)]))
    return torch.stack(points, dim=1)


def privacy_score(curve: Tensor) -> Tensor:
    """Return S_pri: (B, 21) -> (B,), the area under the curve by the trapezoid rule, about 0 to 1. Lower is more
    private."""
    return (curve[:, 1:] + curve[:, :-1]).mean(dim=1) / 2


def jacobian(model: nn.Module, images: Tensor) -> Tensor:
    """Return (B, C H W): the derivative of the sum of an image's logits by the image."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(model(images).sum(), images)[0].flatten(1)


def accuracy_score(rows: Tensor) -> float:
    """Return S_acc = -sum of ln(s + 1e-5) + 1 / (s + 1e-5) over the eigenvalues s of the correlation of the rows (N,
    pixels).

    Higher is better; -N at most, for uncorrelated rows: compare only scores of the same N.
    """
    not_empty(rows, "the accuracy score")
    values = torch.linalg.eigvalsh(torch.corrcoef(rows.double())).clamp_min(0)
    return -float((torch.log(values + SMALL) + 1 / (values + SMALL)).sum())


def first_of_class(labels: Tensor) -> Tensor:
    """Return places of the images whose class has not occurred before, the only ones the official accuracy score
    counts.

    It makes N the number of classes that happen to be in the batch, and the threshold a property of the data set.
    """
    seen: dict[int, int] = {}
    for place, label in enumerate(labels.tolist()):
        seen.setdefault(label, place)
    return torch.tensor(sorted(seen.values()))


def rank(privacy: np.ndarray, accuracy: np.ndarray, threshold: float, weight: float = 0.7) -> list[tuple[int, float]]:
    """Return policies in order, best first, as (place, combined privacy score); lower is better.

    privacy (policies, classes): mean S_pri of each class; accuracy (policies, batches). Those whose mean accuracy score
    lies below `threshold` are left out. Combined: weight * mean + (1 - weight) * variance over the classes, each scaled
    to [0, 1] over all policies (TPAMI 2023); weight 1 is the order of CVPR 2021, by the mean alone.
    """
    combined = weight * _unit(privacy.mean(axis=1)) + (1 - weight) * _unit(privacy.var(axis=1))
    kept = [place for place in np.argsort(combined, kind="stable") if accuracy[place].mean() >= threshold]
    return [(int(place), float(combined[place])) for place in kept]


def _unit(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)
