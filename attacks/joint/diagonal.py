"""Diagonalise several symmetric matrices at once; predict the error of the tokens from the antisymmetric part.

Two matrices S1 = A^T T1 A, S2 = A^T T2 A with diagonal T1, T2 are solved by their pencil: the eigenvectors v of
S1 v = mu S2 v are the columns of A^-1. More than two, each with errors of its own, are diagonalised jointly from there
by damped sweeps of pairwise steps: off-diagonal D_ij + d_i x_ij + d_j x_ji is made small over all of them at once.

Nothing in the gradients makes the computed matrices symmetric but the truth of the equations: their antisymmetric part
is all error, and the error of the symmetric part is taken to be as large.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.joint.forms import TRUSTED, Forms
from attacks.linear.row_spaces import least_squares
from attacks.threat_model.leak import RefusalError

SWEEPS, TRIES = 200, 8
LARGEST = 0.3  # of a step: undamped sweeps diverge
PROGRESS = 1e-6
LEAST = {True: 1e-12, False: 1e-7}  # predicted error, by cleanness


@dataclass(frozen=True)
class Tokens:
    """Distinct patch tokens. patches (n, P) normalised; mixed (n, D): what attention returned; places (n, D): what is
    added to each, None where nothing is; error (n,): predicted root mean square error of a pixel, normalised."""

    patches: Tensor
    mixed: Tensor
    places: Tensor | None
    error: Tensor

    def at(self, chosen: Tensor) -> "Tokens":
        """Return the chosen tokens: indices or bool (n,)."""
        return Tokens(*(None if part is None else part[chosen] for part in self._parts()))

    def joined(self, others: "Tokens") -> "Tokens":
        """Return these tokens and the others behind them."""
        pairs = zip(self._parts(), others._parts(), strict=True)
        return Tokens(*(None if first is None else torch.cat([first, second]) for first, second in pairs))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.patches, self.mixed, self.places, self.error


def tokens_of(forms: Forms, found: Tensor | None = None, every: bool = False) -> Tokens:
    """Return the tokens that the forms have in common, prefix tokens left out.

    found (m, D): centred tokens z^ that are known, prefix tokens among them. They are taken out of the forms
    (deflation), and what is returned are the others: with N the vectors that no found alpha sees, the dual vectors of
    the others are v = N y with N^T S N y diagonal, and S v is a multiple of alpha. every: use all forms, each by how
    symmetric it is, and not the good ones alone.
    """
    if forms.tokens < 1:
        raise RefusalError("attack 'joint' sees no patch above the noise of this gradient")
    wrong = forms.misfits.clamp_min(torch.finfo(forms.matrices.dtype).eps)  # of one token none is antisymmetric
    order = wrong.argsort()
    used = order if every else order[: max(2, int((wrong < TRUSTED).sum()))]
    weights = wrong[order[0]] / wrong[used] if every else torch.ones_like(wrong[used])
    matrices = forms.matrices[used]  # the best two are diagonalised first
    if found is None:
        axes = _common_axes(matrices, weights)  # (r, r), columns dual to the tokens
        alpha = torch.linalg.inv(axes)
    else:
        known = least_squares(forms.entering.T, found.T).T  # (m, r)
        axes, each = _deflated_axes(matrices, weights, known)  # (r, k), (F, k, r) for the k = r - m others
        alpha = each.sum(dim=0)
    axes, alpha = axes * alpha.norm(dim=1), alpha / alpha.norm(dim=1, keepdim=True)
    images = alpha @ forms.patches  # (r, P + 1), zero for prefix tokens
    wanted = forms.tokens if found is None else len(alpha)
    kept = images[:, -1].abs().argsort(descending=True)[:wanted]
    patches = images[kept, :-1] / images[kept, -1:]

    if forms.lift is None:
        beta = least_squares(forms.down.T, alpha[kept].T).T  # (n, s)
    else:  # each up to a factor that alpha = beta down fixes
        beta = (forms.lift @ axes[:, kept]).T
        back = beta @ forms.down
        beta = beta * ((alpha[kept] * back).sum(dim=1) / back.square().sum(dim=1))[:, None]
    mixed = beta @ forms.mixed
    mixed = mixed[:, :-1] / mixed[:, -1:]
    places = None if forms.places is None else alpha[kept] / images[kept, -1:] @ forms.places

    slips = _slips(matrices, axes)[kept][:, kept]
    factor = images[kept, -1].abs()
    apart = torch.cdist(patches, patches, compute_mode="donot_use_mm_for_euclid_dist").square()
    variance = (slips * (factor[None] / factor[:, None]).square() * apart).sum(dim=1) / patches.shape[1]
    if found is not None:
        variance = variance + disagreement(each[:, kept] @ forms.patches, patches)
    tilt = forms.span.error(torch.nn.functional.pad(patches, (0, 1), value=1.0))
    error = (variance + tilt.square()).sqrt().clamp_min(LEAST[forms.span.clean])
    if float(wrong[used].max()) > TRUSTED:  # no small error any more: nothing is known of its size
        error = torch.full_like(error, torch.inf)
    return Tokens(patches, mixed, places, error)


def _common_axes(matrices: Tensor, weights: Tensor) -> Tensor:
    """Return columns (r, r) that make all matrices (F, r, r) diagonal, each by its weight (F,), the first two exactly
    if there are no more."""
    if not matrices.shape[1]:  # everything was taken out
        return matrices[0]
    axes = pencil(matrices)
    return jointly(matrices, axes, weights) if len(matrices) > 2 else axes


def _deflated_axes(matrices: Tensor, weights: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return (columns (r, k) dual to the k = r - m tokens that are not found (m, r); their alpha (F, k, r) by every
    form, weighed as it is to be summed), each token up to a factor."""
    rank = int(torch.linalg.matrix_rank(found, rtol=1e-8))
    unseen = torch.linalg.svd(found, full_matrices=True).Vh[rank:].T  # (r, k)
    axes = unseen @ _common_axes(unseen.T @ matrices @ unseen, weights)
    forms = symmetric(matrices)
    diagonal = ((axes.T @ forms) * axes.T).sum(dim=2)  # (F, k)
    # S v is a multiple of alpha in every form, with an error as large as the antisymmetric part makes.
    noise = ((matrices - forms) @ axes).square().sum(dim=1)  # (F, k)
    least = torch.finfo(noise.dtype).eps ** 2 * (forms @ axes).square().sum(dim=1)
    share = 1 / (noise + least).clamp_min(torch.finfo(noise.dtype).tiny)
    return axes, torch.einsum("fk,frs,sk->fkr", diagonal * share, forms, axes)


def disagreement(each: Tensor, patches: Tensor) -> Tensor:
    """Return the variance (k,) of a pixel of patches (k, P) over the forms, images (F, k, P + 1) of which they are the
    sum: the errors of tokens that were taken out reach every form in its own measure."""
    weight = each[..., -1]  # (F, k)
    apart = (each[..., :-1] - weight[..., None] * patches).square().mean(dim=2)
    return apart.sum(dim=0) / weight.sum(dim=0).square()


def pencil(matrices: Tensor) -> Tensor:
    """Return the eigenvectors (r, r) of the first two of matrices (F, r, r), as columns; of a complex pair the real and
    the imaginary part."""
    first, second = symmetric(matrices)[:2]
    values, vectors = torch.linalg.eig(torch.linalg.solve(second, first))
    upper = values.imag > 0
    return torch.cat([vectors.real[:, values.imag == 0], vectors.real[:, upper], vectors.imag[:, upper]], dim=1)


def jointly(matrices: Tensor, start: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return columns (r, r) that make all symmetric parts of matrices (F, r, r) as diagonal as possible; weights (F,):
    of each once they are of one size, all alike by default."""
    forms = symmetric(matrices)
    start = start / start.norm(dim=0)
    size = (start.T @ forms @ start).diagonal(dim1=1, dim2=2).abs().median(dim=1).values
    weights = torch.ones_like(size) if weights is None else weights
    forms = forms * (weights / size.clamp_min(torch.finfo(size.dtype).tiny))[:, None, None]
    axes = _balanced(forms, start)
    cost = _off(forms, axes)
    for _ in range(SWEEPS):
        step = _sweep(axes.T @ forms @ axes).clamp(-LARGEST, LARGEST)
        length = min(1.0, LARGEST * len(axes) ** 0.5 / max(float(step.norm()), 1e-300))
        for _ in range(TRIES):
            trial = _balanced(forms, axes + length * axes @ step)
            reached = _off(forms, trial)
            if reached < cost:
                break
            length /= 3
        else:
            break
        gain = 1 - reached / cost
        axes, cost = trial, reached
        if gain < PROGRESS:
            break
    return axes


def symmetric(matrices: Tensor) -> Tensor:
    """Return the symmetric parts of matrices (F, r, r)."""
    return (matrices + matrices.mT) / 2


def _balanced(forms: Tensor, axes: Tensor) -> Tensor:
    """Return axes scaled such that the squares of each one's diagonal entries sum to one over the forms."""
    diagonal = ((axes.T @ forms) * axes.T).sum(dim=2)  # (F, r)
    return axes / diagonal.square().sum(dim=0).clamp_min(1e-300) ** 0.25


def _off(forms: Tensor, axes: Tensor) -> float:
    found = axes.T @ forms @ axes
    return float((found - torch.diag_embed(found.diagonal(dim1=1, dim2=2))).square().sum())


def _sweep(found: Tensor) -> Tensor:
    """Return the step X (r, r) that minimises sum_f (D_ij + d_i x_ij + d_j x_ji)^2 for every pair, slightly damped."""
    diagonal = found.diagonal(dim1=1, dim2=2)  # (F, r)
    power, cross = 1.001 * diagonal.square().sum(dim=0), diagonal.T @ diagonal
    slope = (found * diagonal[:, :, None]).sum(dim=0)  # (r, r): sum_f D_ij d_i
    determinant = power[:, None] * power[None] - cross.square()
    step = -(slope * power[None] - cross * slope.T) / determinant.clamp_min(1e-30)
    return step.fill_diagonal_(0)


def _slips(matrices: Tensor, axes: Tensor) -> Tensor:
    """Return (r, r) variances: how much of token j's alpha the errors of the matrices add to that of token i."""
    found = axes.T @ matrices @ axes
    wrong = ((found - found.mT) / 2).square()  # (F, r, r)
    # Single entries may be small by chance: a variance that is a product of one number for each token is not.
    size = wrong.mean(dim=2)
    wrong = size[:, :, None] * size[:, None] / size.mean(dim=1).clamp_min(1e-300)[:, None, None]
    diagonal = found.diagonal(dim1=1, dim2=2)  # (F, r)
    scale = diagonal.square().mean(dim=1).clamp_min(1e-300).sqrt()[:, None]
    diagonal, wrong = diagonal / scale, wrong / scale[..., None].square()
    power, cross = diagonal.square().sum(dim=0), diagonal.T @ diagonal
    determinant = power[:, None] * power[None] - cross.square()
    weight = diagonal[:, :, None] * power[None, None] - cross[None] * diagonal[:, None]  # of D_ij in x_ij
    slips = (weight.square() * wrong).sum(dim=0) / determinant.square().clamp_min(1e-300)
    return slips.fill_diagonal_(0)
