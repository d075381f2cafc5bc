"""Features, logits and labels of every image of a batch, from the gradient of the classifier alone.

For the mean cross-entropy of B images with features f in front of the classifier (W, b) and labels y, the gradient of
[W | b] is sum_i w_i e_i [f_i; 1]^T with e = softmax(W f + b) - onehot(y) and w = 1/B. Its rows span the vectors [f; 1]
of all images, its columns their e. So a feature is a point of the affine hull that the rows give away, B - 1 unknowns,
whose softmax less one label lies in the span of the columns: C - B equations. Levenberg-Marquardt solves them.

Start: row c of the gradient divided by its entry in the gradient of the bias is a weighted mean of features, and where
c is the label of one image nearly that image's. What is found is taken out on both sides, by projection, so that each
round leaves fewer unknowns and more equations; a label that is there twice has two solutions.

Proof: e and [f; 1] are one image's if and only if taking w e [f; 1]^T away lowers the rank, for which w is
1 / ([f; 1]^T G^+ e) (Wedderburn's rank reduction). A solution is kept where this number is a known weight; a multiple
of one says how often the same image is there. It works for any network that ends in a linear layer, and for clients
that train nothing but that.

Source: derived for this project; docs/method.md. Rows by their bias: Geiping et al., NeurIPS 2020, section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from math import isclose

import torch
from torch import Tensor, nn

from attacks.linear.row_spaces import affine_hull
from attacks.threat_model.leak import RefusalError

STEPS, TRIES = 30, 8
TOGETHER = 64  # problems solved side by side
ROUNDS, IDLE = 20, 2  # rounds over all labels, and those without a new solution after which it stops
AROUND = 3  # starts of each label beside its own row
ABOVE = {torch.float64: 30.0, torch.float32: 2.0}  # times the noise from which on a singular value is an image's
MORE = 8  # labels tried beyond those whose entry in the gradient of the bias is negative
SOLVED = {torch.float64: 1e-8, torch.float32: 1e-5}  # relative misfit of a solution
CERTAIN = {torch.float64: 1e-5, torch.float32: 1e-3}  # predicted relative error of a feature up to which it is claimed
WEIGHT = {torch.float64: 1e-5, torch.float32: 1e-2}  # relative error of the weight that proves a solution
APART = 1e-3  # relative distance from which two solutions are two images
CHECKED = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative misfit of the predicted gradient
SEVERAL = 4  # equal images told apart by unequal weights


@dataclass(frozen=True)
class ClassFeatures:
    """What a classifier's gradient says of the images behind it, ascending by label.

    features (n, F), logits (n, C) and labels (n,) int64 of the distinct ones found; counts (n,) int64: how many equal
    images each stands for; error (n,): predicted relative error of the feature; number: images in all; check: relative
    misfit of the gradient they predict; complete: whether all images were found and the check holds."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    counts: Tensor
    error: Tensor
    number: int
    check: float
    complete: bool

    @property
    def found(self) -> int:
        """Return how many images are open, equal ones counted."""
        return int(self.counts.sum())


def class_features(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    classifier: tuple[Tensor, Tensor],
    number: int,
    *,
    generator: torch.Generator,
    weights: Sequence[float] | None = None,
) -> ClassFeatures:
    """Return features and labels of `number` images behind the gradients (C, F) and (C,) of a linear classifier.

    Raises UserError for more images than the equations can tell apart.

    Args:
        classifier: Its weight (C, F) and bias (C,).
        generator: Draws the starts beside the rows of the gradient.
        weights: Of every image in the gradient, in any order; default 1 / number for each.
    """
    dtype = weight_gradient.dtype if weight_gradient.dtype in SOLVED else torch.float32
    head = Classifier(*(value.detach().double().cpu() for value in classifier))
    check_count(number, *head.weight.shape)
    weights = tuple(weights or (1 / number,) * number)
    matrix = torch.cat([weight_gradient, bias_gradient[:, None]], dim=1).detach().double().cpu()
    search = Search(matrix, head, number, dtype)
    found: list[Solution] = []
    idle = 0
    for rank in range(ROUNDS):
        if len(found) == search.rank or idle == IDLE:
            break
        new = _kept(search.round(found, rank, generator), found, search, weights)
        idle = 0 if new else idle + 1
        found += new
    return _result(found, search, number)


@dataclass(frozen=True)
class Classifier:
    """The linear layer: weight (C, F), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def excess(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return softmax(W f + b) - onehot(y) (n, C) of features (n, F)."""
        return (features @ self.weight.T + self.bias).softmax(dim=1) - nn.functional.one_hot(labels, len(self.bias))


@dataclass(frozen=True)
class Solution:
    """One image: feature (F,), label, predicted relative error, relative misfit, weight in the gradient, and how many
    equal ones it stands for."""

    feature: Tensor
    label: int
    error: float
    misfit: float
    weight: float = 0.0
    count: int = 1


class Search:
    """The gradient [dW | db] (C, F + 1) with its rows divided by their size, and what is left of it."""

    def __init__(self, matrix: Tensor, head: Classifier, number: int, dtype: torch.dtype):
        self.matrix, self.head, self.dtype = matrix, head, dtype
        size = matrix.norm(dim=1)
        self.scale = size.clamp_min(max(1e-10 * float(size.max()), torch.finfo(torch.float64).tiny))  # (C,)
        self.scaled = matrix / self.scale[:, None]
        left, values, right = torch.linalg.svd(self.scaled, full_matrices=False)
        beyond = float(values[number]) if number < len(values) else 0.0  # only noise is left there
        self.noise = max(beyond, float(values[0]) * torch.finfo(dtype).eps)
        self.rank = min(number, int((values > ABOVE[dtype] * self.noise).sum()))
        self.left, self.basis = left[:, : self.rank], right[: self.rank]  # (C, r), (r, F + 1)
        self.inverse = self.basis.T / values[: self.rank]  # (F + 1, r)

    def weight_of(self, solution: Solution) -> float:
        """Return the weight with which taking the solution away would lower the rank."""
        feature, excess = self._sides([solution])
        inner = float((feature[0] @ self.inverse) @ (self.left.T @ excess[0]))
        return 1 / inner if inner else torch.inf

    def tilt(self, solution: Solution) -> float:
        """Return the relative error that noise in the row space alone gives a feature."""
        feature = nn.functional.pad(solution.feature, (0, 1), value=1.0)
        entry = self.noise / sum(size**0.5 for size in self.matrix.shape)  # of a matrix of noise with such a norm
        return entry * float((feature @ self.inverse).norm()) * len(feature) ** 0.5 / float(solution.feature.norm())

    def round(self, found: list[Solution], number: int, generator: torch.Generator) -> list[Solution]:
        """Return a solution for every label and start, of the images that are left."""
        rest, basis, reach = self.matrix, self.basis, self.left
        if found:
            features, excess = self._sides(found)
            left = self.rank - len(found)
            one, other = torch.linalg.qr(excess.T).Q, torch.linalg.qr(features.T).Q
            basis = torch.linalg.svd(self.scaled - one @ (one.T @ self.scaled), full_matrices=False).Vh[:left]
            beyond = self.scaled - (self.scaled @ other) @ other.T
            reach = torch.linalg.svd(beyond, full_matrices=False).U[:, :left]
            weights = torch.tensor([one.weight for one in found], dtype=torch.float64)
            rest = self.matrix - (excess * weights[:, None] * self.scale).T @ features
        point, axes = affine_hull(basis)
        hull = Hull(self.head, point, axes, reach, self.scale)
        begun, labels = self._starts(rest, hull, number, generator)
        solved = [hull.solve(*batch) for batch in zip(begun.split(TOGETHER), labels.split(TOGETHER), strict=True)]
        features, misfit, error = (torch.cat(parts) for parts in zip(*solved, strict=True))
        rows = zip(features, labels.tolist(), error.tolist(), misfit.tolist(), strict=True)
        return [Solution(feature, label, wrong, off) for feature, label, wrong, off in rows]

    def _starts(self, rest: Tensor, hull: "Hull", number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return coordinates (S, r) to start from and the label (S,) of each."""
        bias = rest[:, -1]
        labels = bias.argsort()[: min(len(bias), max(1, int((bias < 0).sum())) + MORE)]  # the clearest first
        own = hull.coordinates(rest[labels, :-1] / _away_from_zero(bias[labels])[:, None])
        large = bias.abs().argsort(descending=True)[: max(8, hull.axes.shape[0])]  # rows that are means of features
        means = hull.coordinates(rest[large, :-1] / _away_from_zero(bias[large])[:, None])
        spread = (means - means.median(dim=0).values).abs().median(dim=0).values
        chosen = means[torch.randint(len(means), (len(labels) * AROUND,), generator=generator)]
        noise = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
        around = chosen + noise * spread * (0.1 if number % 2 else 1.0)
        return torch.cat([own, around]), torch.cat([labels, labels.repeat_interleave(AROUND)])

    def _sides(self, found: Sequence[Solution]) -> tuple[Tensor, Tensor]:
        """Return [f; 1] (n, F + 1) and e divided by the scale of rows (n, C)."""
        features = torch.stack([one.feature for one in found])
        excess = self.head.excess(features, torch.tensor([one.label for one in found]))
        return nn.functional.pad(features, (0, 1), value=1.0), excess / self.scale


@dataclass(frozen=True)
class Hull:
    """The equations of one image: features point + c axes (F,), (r, F) whose e, divided by scale (C,), lies in the span
    of the orthonormal columns of reach (C, k)."""

    head: Classifier
    point: Tensor
    axes: Tensor
    reach: Tensor
    scale: Tensor

    def coordinates(self, features: Tensor) -> Tensor:
        """Return the coordinates (n, r) of the points of the hull nearest to features (n, F)."""
        return (features - self.point) @ self.axes.T

    def outside(self, rows: Tensor) -> Tensor:
        """Return what rows (..., C) have outside the columns."""
        return rows - (rows @ self.reach) @ self.reach.T

    def solve(self, begun: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (S, F), their relative misfits (S,) and predicted relative errors (S,) from coordinates
        (S, r) on, by Levenberg-Marquardt."""
        offset, slope = self.head.weight @ self.point + self.head.bias, self.head.weight @ self.axes.T  # (C,), (C, r)
        hot = nn.functional.one_hot(labels, len(offset)).double()

        def at(value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            probabilities = (offset + value @ slope.T).softmax(dim=1)
            excess = (probabilities - hot[rows]) / self.scale
            return probabilities, self.outside(excess), excess.square().sum(dim=1)

        def normal(rows: Tensor) -> tuple[Tensor, Tensor]:
            own = probabilities[rows]
            steep = (own / self.scale)[:, :, None] * (slope - (own @ slope)[:, None])  # (s, C, r)
            steep = steep - self.reach @ (self.reach.T @ steep)
            return steep.mT @ steep, (steep.mT @ error[rows][:, :, None])[:, :, 0]

        value, everything = begun.clone(), torch.arange(len(begun))
        probabilities, error, size = at(value, everything)
        cost, damping = error.square().sum(dim=1), torch.full((len(begun),), 1e-2, dtype=torch.float64)
        active = everything if begun.shape[1] else everything[:0]
        for _ in range(STEPS):
            if not len(active):
                break
            curvature, right = normal(active)
            diagonal = curvature.diagonal(dim1=1, dim2=2)
            diagonal = diagonal.clamp_min(1e-12 * diagonal.amax(dim=1, keepdim=True))
            waiting = torch.arange(len(active))
            for _ in range(TRIES):
                rows = active[waiting]
                damped = curvature[waiting] + torch.diag_embed(damping[rows][:, None] * diagonal[waiting])
                factor, failed = torch.linalg.cholesky_ex(damped)
                trial = value[rows] - torch.cholesky_solve(right[waiting][:, :, None], factor)[:, :, 0]
                reached = at(trial, rows)
                lower = (reached[1].square().sum(dim=1) < cost[rows]) & (failed == 0)
                better = rows[lower]
                value[better], cost[better] = trial[lower], reached[1][lower].square().sum(dim=1)
                for kept, new in zip((probabilities, error, size), reached, strict=True):
                    kept[better] = new[lower]
                damping[better] = (damping[better] / 5).clamp_min(1e-15)
                damping[rows[~lower]] *= 6
                waiting = waiting[~lower]
                if not len(waiting):
                    break
            moved = torch.ones(len(active), dtype=torch.bool)
            moved[waiting] = False
            active = active[moved & (cost[active] > 1e-28 * size[active])]
        features = self.point + value @ self.axes
        floor = cost.clamp_min(1e-30 * size) / (len(offset) - self.reach.shape[1])  # variance of an equation
        curvature, _ = normal(everything)
        spectrum = torch.linalg.eigvalsh(curvature)  # (S, r), ascending
        spectrum = spectrum.clamp_min(torch.finfo(spectrum.dtype).eps * spectrum[:, -1:])
        wrong = (floor * (1 / spectrum).sum(dim=1)).sqrt() / features.norm(dim=1)
        return features, (cost / size).sqrt(), wrong


def _away_from_zero(values: Tensor) -> Tensor:
    return values.sign().where(values != 0, 1.0) * values.abs().clamp_min(torch.finfo(values.dtype).tiny)


def _kept(solutions: list[Solution], found: list[Solution], search: Search, weights: Sequence[float]) -> list[Solution]:
    """Return the solutions that are new, hold and are proved by their weight, the surest first."""
    new: list[Solution] = []
    for one in sorted(solutions, key=lambda solution: solution.misfit):
        if not one.misfit < SOLVED[search.dtype] or len(found) + len(new) == search.rank:
            break
        if not one.error < CERTAIN[search.dtype] or not all(_differ(one, other) for other in (*found, *new)):
            continue
        measured = search.weight_of(one)
        weight, count = _multiple(measured, weights, WEIGHT[search.dtype])
        if count:
            wrong = max(one.error, search.tilt(one), abs(measured / weight - 1))
            if wrong < CERTAIN[search.dtype]:
                new.append(replace(one, error=wrong, weight=weight, count=count))
    return new


def _differ(one: Solution, other: Solution) -> bool:
    apart = float((one.feature - other.feature).norm())
    return one.label != other.label or apart > APART * float(one.feature.norm())


def _multiple(weight: float, weights: Sequence[float], tolerance: float) -> tuple[float, int]:
    """Return (the sum of weights of images that a weight is, how many they are), or zeros."""
    kinds, number = sorted(set(weights)), len(weights)
    for count in range(1, number + 1 if len(kinds) == 1 else min(number, SEVERAL) + 1):
        for some in combinations_with_replacement(kinds, count):
            if isclose(weight, sum(some), rel_tol=tolerance / count):
                return sum(some), count
    return 0.0, 0


def _result(found: list[Solution], search: Search, number: int) -> ClassFeatures:
    found = sorted(found, key=lambda one: one.label)
    classes, width = search.head.weight.shape
    features = torch.stack([one.feature for one in found]) if found else search.matrix.new_zeros(0, width)
    labels = torch.tensor([one.label for one in found], dtype=torch.long)
    counts = torch.tensor([one.count for one in found], dtype=torch.long)
    error = torch.tensor([one.error for one in found], dtype=torch.float64)
    weights = torch.tensor([one.weight for one in found], dtype=torch.float64)
    excess = search.head.excess(features, labels) if found else search.matrix.new_zeros(0, classes)
    predicted = (excess * weights[:, None]).T @ nn.functional.pad(features, (0, 1), value=1.0)
    check = float((predicted - search.matrix).norm() / search.matrix.norm())
    complete = int(counts.sum()) == number and check < CHECKED[search.dtype]
    logits = features @ search.head.weight.T + search.head.bias
    return ClassFeatures(features, logits, labels, counts, error, number, check, complete)


def check_count(number: int, classes: int, width: int) -> None:
    """Raise UserError for more images than a classifier of so many classes and features tells apart."""
    if 2 * number > classes or number > width:
        raise RefusalError(
            f"class features of {number} images need at most {min(classes // 2, width)} of them: half as many as "
            f"classes ({classes}), no more than features ({width})"
        )
