"""Features, logits and labels of every image of a batch, from the gradient of the classifier alone.

For the mean cross-entropy of B images with features f in front of the classifier (W, b) and labels y, the gradient of
[W | b] is 1/B sum (softmax(W f + b) - onehot(y)) [f; 1]^T. Its rows span the vectors [f; 1] of all images, its columns
their probabilities less labels. So a feature is a point of the affine hull that the rows give away, B - 1 unknowns,
whose softmax less one label lies in the span of the columns: C - B equations. Levenberg-Marquardt solves them, label by
label, from features of noise and then from those already found; a label that is there twice has two solutions. The
gradient is then predicted from what was found: a check that needs no truth. It works for any network that ends in a
linear layer, and for clients that train nothing but that.

Source: derived for this project; docs/method.md. Labels by sign: Zhao et al. (iDLG), 2020.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.joint_rows import affine_hull, rows_of
from utils.errors import UserError

STEPS, TRIES = 30, 12
ROUNDS, FEW = 12, 4  # times all labels are tried; starts of each kind for a label after the first
MORE = 4  # labels tried beyond those whose entry in the gradient of the bias is negative
SOLVED = {torch.float64: 1e-8, torch.float32: 1e-5}  # relative misfit of a solution
APART = 1e-3  # relative distance from which two solutions are two images
CHECKED = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative misfit of the predicted gradient


@dataclass(frozen=True)
class ClassFeatures:
    """What a classifier's gradient says of the images behind it. features (n, F) and labels (n,) int64 of those found,
    ascending by label; check: relative misfit of the gradient they predict, 1 if some are missing; complete: whether
    all images were found and the check holds."""

    features: Tensor
    labels: Tensor
    check: float
    complete: bool


def class_features(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    classifier: tuple[Tensor, Tensor],
    number: int,
    *,
    starts: Tensor,
    generator: torch.Generator,
) -> ClassFeatures:
    """Return features and labels of `number` images behind the gradients (C, F) and (C,) of a linear classifier.

    classifier: its weight (C, F) and bias (C,); starts (S, F): features to start from, of any images; generator draws
    as many more around them. Equal images count once, so that a batch which holds some is not complete. Raises
    UserError for more images than the equations can tell apart.
    """
    dtype = weight_gradient.dtype if weight_gradient.dtype in SOLVED else torch.float32
    weight, bias = (value.detach().double().cpu() for value in classifier)
    classes, width = weight.shape
    check_count(number, classes, width)
    matrix = torch.cat([weight_gradient, bias_gradient[:, None]], dim=1).detach().double().cpu()
    rows = rows_of(matrix, number, dtype)
    point, basis = affine_hull(rows.basis)
    logits = weight @ point + bias, weight @ basis.T  # (C,), (C, r): of the point, along the axes
    begun = (starts.double().cpu() - point) @ basis.T  # (S, r)
    wide = begun.norm(dim=1, keepdim=True) / max(1, len(basis)) ** 0.5
    noise = torch.randn(len(begun), len(basis), generator=generator, dtype=torch.float64)
    begun = torch.cat([begun, begun + wide * noise])
    order = matrix[:, -1].argsort().tolist()[: int((matrix[:, -1] < 0).sum()) + MORE]  # the clearest label first
    features: list[Tensor] = []
    labels: list[int] = []
    for _ in range(ROUNDS):
        for label in order:
            for start in begun if len(labels) < len(rows.basis) else ():
                found, misfit = _solve(*logits, label, rows.reach, start)
                feature = point + found @ basis
                if misfit < SOLVED[dtype] and all(_differ(feature, one) for one in features):
                    features.append(feature)
                    labels.append(label)
        if len(labels) == len(rows.basis) or not labels:
            break
        # Nothing is as near to features as features: start from the new ones, and around those known.
        near = (torch.stack(features) - point) @ basis.T  # (n, r)
        chosen = torch.randint(len(near), (2 * FEW,), generator=generator)
        noise = torch.randn(FEW, len(basis), generator=generator, dtype=torch.float64)
        begun = torch.cat([near[chosen[:FEW]], near[chosen[FEW:]] + noise * near.std(dim=0, correction=0)])
    order = torch.tensor(labels).argsort(stable=True)
    found = torch.stack(features)[order] if features else torch.zeros(0, width, dtype=torch.float64)
    labels = torch.tensor(labels, dtype=torch.long)[order]
    check = 1.0
    if len(labels) == number:
        excess = (found @ weight.T + bias).softmax(dim=1) - nn.functional.one_hot(labels, classes)
        predicted = excess.T @ nn.functional.pad(found, (0, 1), value=1.0) / number
        check = float((predicted - matrix).norm() / matrix.norm())
    return ClassFeatures(found, labels, check, check < CHECKED[dtype])


def check_count(number: int, classes: int, width: int) -> None:
    """Raise UserError for more images than a classifier of so many classes and features tells apart."""
    if 2 * number > classes or number > width:
        raise UserError(
            f"class features of {number} images need at most {min(classes // 2, width)} of them: half as many as "
            f"classes ({classes}), no more than features ({width})"
        )


def _differ(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) > APART * float(one.norm())


def _solve(offset: Tensor, slope: Tensor, label: int, reach: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Return (coordinates (r,) where what softmax(offset + slope c) - onehot(label) has outside the columns of reach
    (C, k) is least, that in parts of its length)."""

    def residual(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = (offset + slope @ value).softmax(dim=0)
        excess = probabilities.clone()
        excess[label] -= 1
        return excess - reach @ (reach.T @ excess), probabilities, excess

    found, damping = start, 1e-2
    error, probabilities, excess = residual(found)
    cost = float(error.square().sum())
    for _ in range(STEPS if len(start) else 0):
        steep = probabilities[:, None] * (slope - probabilities @ slope)  # (C, r)
        steep = steep - reach @ (reach.T @ steep)
        normal, right = steep.T @ steep, steep.T @ error
        scale = normal.diagonal().clamp_min(1e-12 * float(normal.diagonal().max()))
        for _ in range(TRIES):
            factor, failed = torch.linalg.cholesky_ex(normal + damping * torch.diag(scale))
            if not failed:
                trial = found - torch.cholesky_solve(right[:, None], factor)[:, 0]
                reached = residual(trial)
                if float(reached[0].square().sum()) < cost:
                    break
            damping *= 4
        else:
            break
        found, (error, probabilities, excess) = trial, reached
        cost, damping = float(error.square().sum()), max(damping / 5, 1e-15)
        if cost < 1e-28 * float(excess.square().sum()):
            break
    return found, float(cost**0.5 / excess.norm())
