"""Row spaces of the gradients of linear layers: everything that went into a layer, up to a change of basis.

The gradient of a linear layer is sum_t delta_t [a_t; 1]^T over all tokens t, with delta_t what came back and a_t what
went in. Its rows span the inputs, its columns what came back, and its rank is the number of distinct tokens. Rounding
adds noise in proportion to the size of a row, so rows are first divided by their noise (whitened).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.threat_model.leak import Leak

REFINED = 3  # times the noise of the rows is estimated anew, where it is more than that of double precision
CLEAN = 1e-11  # noise below this share of the largest singular value is that of double precision
ABOVE = {True: 30.0, False: 2.0}  # times the noise from which on a singular value is a token's, by cleanness
FAINT, STEP = 100.0, 8.0  # tokens that differ by less than so much noise, a step in size below the others, are one


@dataclass(frozen=True)
class Rows:
    """The gradient (m, n) of a layer. basis (r, n): orthonormal basis of its rows; reach (m, r): orthonormal basis of
    its columns; values (r,): the singular values of the whitened gradient; noise: the largest one that can only be
    noise; clean: whether that is rounding in double precision."""

    gradient: Tensor
    basis: Tensor
    reach: Tensor
    values: Tensor
    noise: float
    clean: bool

    @property
    def above(self) -> int:
        """Return how many of the singular values stand above rounding."""
        return int((self.values > ABOVE[self.clean] * self.noise).sum())

    def on(self, basis: Tensor) -> Tensor:
        """Return sum_t delta_t c_t (m, r) for tokens with coordinates c_t in a basis (r, n)."""
        return least_squares(basis.T, self.gradient.T).T

    def error(self, vectors: Tensor) -> Tensor:
        """Return the predicted error (V,) of an entry of vectors (V, n) in the span, from how noise tilts the basis."""
        entry = self.noise / (sum(self.gradient.shape) ** 0.5)
        return entry * ((vectors @ self.basis.T) / self.values).norm(dim=1)


def rows_of(
    gradient: Tensor, limit: int, dtype: torch.dtype, least: int = 0, rank: int | None = None, faint: bool = False
) -> Rows:
    """Return the row space of a gradient (m, n) of at most `limit` distinct tokens, shared in precision dtype.

    The rank is read from the singular values, unless it is given: those beyond `limit` are noise alone.

    Args:
        least: How many distinct tokens there are for certain, as other gradients show; their directions are kept where
            noise drowns them.
        faint: Keep all directions above noise, of tokens that are nearly equal too.
    """
    tiny = torch.finfo(gradient.dtype).tiny
    scale = gradient.norm(dim=1)  # (m,)
    scale = scale.clamp_min(max(1e-10 * float(scale.max()), tiny))
    for refined in range(REFINED + 1):
        whitened = gradient / scale[:, None]
        left, values, right = torch.linalg.svd(whitened, full_matrices=False)
        noise = max(float(values[limit]) if limit < len(values) else 0.0, float(values[0]) * torch.finfo(dtype).eps)
        clean = noise < CLEAN * float(values[0])
        if clean or refined == REFINED or limit >= min(gradient.shape):
            break
        rest = whitened - (left[:, :limit] * values[:limit]) @ right[:limit]  # (m, n)
        power = rest.square().mean(dim=1)
        if not bool(power.any()):
            break  # no noise at all
        # What the leading axes took of a row's noise is made up by that of a middling row: else rows run away.
        power = power + left[:, :limit].square().sum(dim=1) * power.median()
        scale = scale * power.clamp_min(1e-20 * float(power.max())).sqrt()  # rows of zeros: pruned, or of no class
    if rank is None:
        rank = max(_rank(values[:limit], noise, clean, faint), least)
    rank = min(rank, limit, len(values))
    reach = torch.linalg.qr(left[:, :rank] * scale[:, None]).Q  # (m, r)
    return Rows(gradient, right[:rank], reach, values[:rank], noise, clean)


def _rank(values: Tensor, noise: float, clean: bool, faint: bool) -> int:
    """Return how many singular values (descending) are above noise, and unless `faint`, of tokens that can be told
    apart."""
    rank = int((values > ABOVE[clean] * noise).sum())
    for above in range(1, 0 if clean or faint else rank):
        if values[above] < min(FAINT * noise, float(values[above - 1]) / STEP):
            return above
    return rank


def with_bias(leak: Leak, layer: str) -> Tensor:
    """Return [dL/dW | dL/db] (m, n + 1) of a layer, in float64 on the CPU."""
    weight, bias = (leak.gradient(f"{layer}.{part}", "joint").double().cpu() for part in ("weight", "bias"))
    return torch.cat([weight.flatten(1), bias[:, None]], dim=1)


def behind_norm(leak: Leak, layer: str, norm: nn.LayerNorm) -> Tensor:
    """Return sum_t delta_t n_t^T (m, D) of a layer behind a LayerNorm; n_t is its input before scale and shift."""
    gradient = with_bias(leak, layer)
    scale, shift = (value.detach().double().cpu() for value in (norm.weight, norm.bias))
    return (gradient[:, :-1] - gradient[:, -1:] * shift) / scale


def least_squares(system: Tensor, right: Tensor) -> Tensor:
    """Return the solution (r, k) of least norm of system (m, r) x = right (m, k), with columns scaled to length one."""
    if not system.numel() or not right.numel():
        return system.new_zeros(system.shape[1], right.shape[1])
    scale = system.norm(dim=0).clamp_min(torch.finfo(system.dtype).tiny)
    return torch.linalg.lstsq(system / scale, right, driver="gelsd", rcond=1e-13).solution / scale[:, None]


def outside(vectors: Tensor, columns: Tensor) -> Tensor:
    """Return the part of vectors (D, k) outside the span of orthonormal columns (D, r)."""
    return vectors - columns @ (columns.T @ vectors)


def orthonormal(*columns: Tensor) -> Tensor:
    """Return an orthonormal basis (D, r) of all these columns together."""
    return torch.linalg.qr(torch.cat(columns, dim=1)).Q


def affine_hull(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (point (P,), orthonormal directions (k - 1, P)) of all a with [a; 1] in the span of rows (k, P + 1)."""
    last = rows[:, -1]
    point = rows[:, :-1].T @ last / last.square().sum()
    flat = torch.linalg.svd(last[None]).Vh[1:] @ rows[:, :-1]
    return point, torch.linalg.qr(flat.T).Q.T
