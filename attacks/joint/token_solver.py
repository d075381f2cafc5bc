"""Solve the equations of one token from where the diagonalisation put it: Gauss-Newton with a prior on what is unseen.

Unknowns are the coordinates c of a patch in the affine hull that the patch projection gives away, and e of what
attention returned to it in that of the attention's projection. With the row of its place known, as in first_block,

    z = W x(c) + b + e_p         [LN1(z); 1]                    in the rows of query, key, value (double precision)
    u = z + P o(e) + q           [LN2(u); 1]                    in the rows of the MLP's first layer
                                 [act(W1 LN2(u) + b1); 1]       in those of its second (random combinations of them)

and no other token appears. In single precision most directions of o drown in rounding; a normal prior on e, as wide as
the tokens of the diagonalisation say, stands in for them. Rows that drown are still left free, as many as there can be
tokens: nearly equal tokens have parts along them. A solution of a batch that is not sure is solved again with all
equations of the second layer, each layer's in parts of its noise.
"""

import copy

import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Block, affine
from attacks.joint.diagonal import LEAST
from attacks.linear.mjp_equations import centre
from attacks.linear.row_spaces import Rows, affine_hull, rows_of, with_bias

COMBINATIONS = 250  # of the equations of the MLP's second layer
WIDE = 5 * 1.4826  # standard deviations of the prior, from median absolute values
WEIGHTS = {True: (1e4, 1e8), False: (1e3, 1e5)}  # of the equations against the prior, by cleanness, in turn
FITS = {True: 1e-8, False: 3e-5}  # root mean square misfit of a solution, by cleanness
FLAT = 1e-13  # singular values of [o; 1] below this share of the largest are none
UNSURE = 1e-3  # predicted error (normalised) from which on all equations of the second layer are used
STEPS, TRIES, PROGRESS = 25, 8, 1e-3


def outputs_of(rows: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean (D,), mixes (s, D)) of what attention returned, [o; 1] in the span of rows (s, D + 1), as wide
    as it is for some tokens, mixed (n, D)."""
    parts = torch.linalg.svd(rows, full_matrices=False)
    rank = int((parts.S / parts.S[0] > FLAT).sum())
    mean, mixes = affine_hull(parts.Vh[:rank])
    spread = WIDE * ((mixed - mean) @ mixes.T).abs().median(dim=0).values  # (s,)
    return mean, mixes * spread.clamp_min(1e-12 * float(spread.max()) if len(spread) else 0.0)[:, None]


def spectral_outputs(block: Block, size: float) -> tuple[Tensor, Tensor]:
    """Return (mean (D,), mixes (s, D)) as outputs_of, without any token: dL/dW = sum g' o^T of the projection says how
    far o goes in each direction, for gradients of a size: the norm of all g' together."""
    projection = with_bias(block.leak, block.name + "attn.proj")  # (D, D + 1)
    weight, bias = projection[:, :-1], projection[:, -1]
    mean = bias @ weight / bias.square().sum()
    rest = weight - torch.outer(bias, mean)
    basis = rows_of(rest, block.passing, block.dtype).basis
    parts = torch.linalg.svd(rest @ basis.T, full_matrices=False)
    return mean, parts.S[:, None] / size * (parts.Vh @ basis)


class TokenSolver:
    """The equations of one token of a batch. point (P,), basis (r, P): patches are point + c basis; mean (D,),
    mixes (s, D): what attention returned is mean + e mixes; each scaled to the spread of its coordinates."""

    def __init__(
        self,
        block: Block,
        hull: tuple[Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],
        clean: bool,
        generator: torch.Generator,
        again: bool = True,
    ):
        """Keep what the equations are made of. hull: (point, basis); outputs: (mean, mixes); clean: whether rounding is
        that of double precision; again: whether a solution that is not sure is solved again with all equations."""
        self.clean, self.again, self.leak, self.block = clean, again, block.leak, block
        self.point, self.basis = hull
        self.mean, self.mixes = outputs
        self.scale = self.mixes.norm(dim=1)

        self.embed = affine(self.leak.model.get_submodule(PATCHES))
        self.back = affine(block.module.attn.proj)
        self.mlp, self.act = affine(block.module.mlp.fc1), block.module.mlp.act
        self.norms = [_norm(norm) for norm in (block.module.norm1, block.module.norm2)]
        # A direction too many costs an equation; one that noise drowns, but a token has, makes all of them wrong.
        prefix = self.leak.batch_size * self.leak.model.num_prefix_tokens
        least = 0 if self.clean else min(block.passing, len(self.basis) + 1 + prefix)  # different ones that leave
        self.layers = [block.augmented("attn.qkv", len(block.tokens.basis))]
        self.layers += [block.augmented("mlp.fc1", max(least, len(block.passed.basis)), least)]
        self.layers += [block.augmented("mlp.fc2", block.passing, least) if least else block.active]
        self.checks = [_complement(rows, None, generator) for rows in self.layers[:-1]]
        self.checks.append(_complement(self.layers[-1], COMBINATIONS, generator))
        if not self.clean:
            self.checks[0] = self.checks[0][:0]
        self.whole = None  # these equations and all others, once they are needed
        self.prior = torch.cat([torch.zeros(len(self.basis)), torch.ones(len(self.mixes))]).to(self.basis)
        self.slope_z = centre(self.basis @ self.embed[:, :-1].T)  # (r, D)
        self.slope_o = centre(self.mixes @ self.back[:, :-1].T)  # (s, D)

    def spread(self, mixed: Tensor, generator: torch.Generator) -> "TokenSolver":
        """Return the same equations with what attention returned as widely spread as it is for some tokens (n, D)."""
        directions = nn.functional.pad(self.mixes / self.scale[:, None], (0, 1))
        rows = torch.cat([directions, nn.functional.pad(self.mean[None], (0, 1), value=1.0)])  # span [o; 1]
        outputs = outputs_of(rows, mixed)
        return TokenSolver(self.block, (self.point, self.basis), outputs, self.clean, generator, self.again)

    def start(self, patches: Tensor, mixed: Tensor) -> Tensor:
        """Return unknowns (V, r + s) of tokens near patches (V, P) and what attention returned (V, D)."""
        coordinates = (mixed - self.mean) @ (self.mixes / self.scale.square()[:, None]).T
        # In single precision o is known to less than its spread: the mean is nearer to every token.
        coordinates = coordinates.clamp(-5, 5) if self.clean else torch.zeros_like(coordinates)
        return torch.cat([(patches - self.point) @ self.basis.T, coordinates], dim=1)

    def patches(self, unknowns: Tensor) -> Tensor:
        """Return patches (V, P)."""
        return self.point + unknowns[..., : len(self.basis)] @ self.basis

    def mixed(self, unknowns: Tensor) -> Tensor:
        """Return what attention returned (V, D)."""
        return self.mean + unknowns[..., len(self.basis) :] @ self.mixes

    def _inputs(self, unknowns: Tensor, position: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return (what enters the layers: query, key and value (D,), the MLP's first (D,) and second (H,); slopes of
        the first two (r + s, D); of the third by what enters the activation (H,))."""
        z = self.patches(unknowns) @ self.embed[:, :-1].T + self.embed[:, -1] + position
        u = z + self.mixed(unknowns) @ self.back[:, :-1].T + self.back[:, -1]
        slopes = torch.cat([self.slope_z, torch.zeros_like(self.slope_o)]), torch.cat([self.slope_z, self.slope_o])
        first, first_slope = _normed(centre(z), slopes[0], self.norms[0])
        second, second_slope = _normed(centre(u), slopes[1], self.norms[1])
        before = self.mlp[:, :-1] @ second + self.mlp[:, -1]
        with torch.enable_grad():
            given = before.clone().requires_grad_()
            active = self.act(given)
            (steep,) = torch.autograd.grad(active.sum(), given)
        return [first, second, active.detach()], [first_slope, second_slope], steep

    def residual(self, unknowns: Tensor, position: Tensor, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return (how far the token's inputs are from the spans of their layers, each in parts of its length (m,), its
        Jacobian (m, r + s) if asked for); position (D,): what is added to the token."""
        inputs, (first_slope, second_slope), steep = self._inputs(unknowns, position)
        lengths = [(value.square().sum() + 1).sqrt() for value in inputs]
        parts = [
            (check[:, :-1] @ value + check[:, -1]) / length
            for value, length, check in zip(inputs, lengths, self.checks, strict=True)
        ]
        if not slope:
            return torch.cat(parts), None
        # Of each: the slope of its input along that of the LayerNorm before it, and of its length.
        deep = steep[:, None] * self.mlp[:, :-1]  # (H, D)
        ways = (first_slope, None), (second_slope, None), (second_slope, deep)
        jacobians = []
        for value, length, check, part, (change, through) in zip(
            inputs, lengths, self.checks, parts, ways, strict=True
        ):
            seen, grown = (check[:, :-1], value) if through is None else (check[:, :-1] @ through, value @ through)
            jacobians.append((seen @ change.T) / length - torch.outer(part, change @ grown) / length.square())
        return torch.cat(parts), torch.cat(jacobians)

    def returned(self, token: Tensor) -> Tensor:
        """Return what attention returned (D,) to a token (D,) that is known, as a prefix token is."""
        alone = copy.copy(self)
        alone.basis, alone.slope_z, alone.point = self.basis[:0], self.slope_z[:0], torch.zeros_like(self.point)
        alone.prior, alone.whole = self.prior[len(self.basis) :], None
        unknowns, _, _ = alone.solve(token.new_zeros(len(self.mixes)), token - self.embed[:, -1])
        return alone.mixed(unknowns)

    def solve(self, unknowns: Tensor, position: Tensor) -> tuple[Tensor, float, float]:
        """Return (unknowns (r + s,), root mean square misfit, predicted error of a pixel, normalised); both
        infinite, and the unknowns as they came, where the equations overflow."""
        start = unknowns
        for turns in (WEIGHTS[self.clean][-1:], WEIGHTS[self.clean]):  # from near by at once, else in turn
            unknowns = start
            for weight in turns:
                weights = start.new_tensor(weight)
                unknowns = self._descend(unknowns, position, weights)
            found = self._judged(unknowns, position, weights)
            if found[1] < FITS[self.clean]:
                break
        if self.again and found[1] < FITS[self.clean] and found[2] > UNSURE:
            found = self._surer(found, position)
        return found if found[1] < torch.inf else (start, *found[1:])

    def _surer(self, found: tuple[Tensor, float, float], position: Tensor) -> tuple[Tensor, float, float]:
        """Return a solution as `solve` does, with all equations of the MLP's second layer where it fits these too, and
        those of each layer in parts of what noise tilts it by: that of one can be five times that of another."""
        if self.whole is None:
            self.whole = copy.copy(self)
            every = _complement(self.layers[-1], None, torch.Generator().manual_seed(0))
            self.whole.checks = [*self.checks[:-1], every]
        tilts = []
        for rows, value in zip(self.layers, self._inputs(found[0], position)[0], strict=True):
            value = nn.functional.pad(value, (0, 1), value=1.0)
            tilts.append(rows.error(value[None] / value.norm()).clamp_min(LEAST[self.clean]))
        sizes = [len(check) for check in self.whole.checks]
        weights = torch.cat([1 / tilt.expand(size) for tilt, size in zip(tilts, sizes, strict=True)])
        surer = self.whole._judged(self.whole._descend(found[0], position, weights), position, weights)
        return surer if surer[1] < FITS[self.clean] else found

    def _judged(self, unknowns: Tensor, position: Tensor, weights: Tensor) -> tuple[Tensor, float, float]:
        """Return what `solve` does, of unknowns where it ended; weights () or (m,): of the equations."""
        error, slope = self.residual(unknowns, position)
        if not bool(torch.isfinite(slope).all() & torch.isfinite(error).all()):
            return unknowns, float("inf"), float("inf")
        misfit = float(error.square().mean().sqrt())
        slope = weights[..., None] * slope
        data = slope.T @ slope
        # What is left of the equations beyond their unknowns says how large their error is.
        freedom = max(1, len(error) - len(unknowns))
        noise = float((weights * error).square().sum()) / freedom
        prior = torch.diag(self.prior)
        inverse = torch.linalg.pinv(data + prior, hermitian=True)
        covariance = inverse @ (noise * data + prior) @ inverse
        variance = covariance.diagonal()[: len(self.basis)].sum() / self.basis.shape[1]
        return unknowns, misfit, max(float(variance.clamp_min(0).sqrt()), LEAST[self.clean])

    def _descend(self, unknowns: Tensor, position: Tensor, weights: Tensor) -> Tensor:
        """Return where damped Gauss-Newton steps on |weights residual|^2 + |e|^2 end; weights () or (m,)."""
        prior = self.prior

        def cost(value: Tensor, error: Tensor) -> Tensor:
            return (weights * error).square().sum() + (prior * value.square()).sum()

        error, slope = self.residual(unknowns, position)
        best, damping = cost(unknowns, error), 1e-3
        for _ in range(STEPS):
            slope = weights[..., None] * slope
            normal = slope.T @ slope + torch.diag(prior)
            right = slope.T @ (weights * error) + prior * unknowns
            for _ in range(TRIES):
                factor, failed = torch.linalg.cholesky_ex(normal + torch.diag(damping * normal.diagonal()))
                if not failed:
                    trial = unknowns - torch.cholesky_solve(right[:, None], factor)[:, 0]
                    reached = cost(trial, self.residual(trial, position, slope=False)[0])
                    if reached < best:
                        break
                damping = max(8 * damping, 1e-12)
            else:
                break
            gain, best, unknowns = 1 - reached / best, reached, trial
            damping = max(damping / 8, 1e-14)
            if gain < PROGRESS:
                break
            error, slope = self.residual(unknowns, position)
        return unknowns


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu(), norm.eps


def _normed(value: Tensor, slope: Tensor, norm: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
    """Return (LayerNorm of a centred value (D,), its derivatives (k, D) along slopes (k, D))."""
    weight, bias, eps = norm
    deviation = (value.square().mean() + eps).sqrt()
    unit = value / deviation
    change = (slope - (slope @ unit / len(unit))[:, None] * unit) / deviation
    return unit * weight + bias, change * weight


def _complement(rows: Rows, number: int | None, generator: torch.Generator) -> Tensor:
    """Return orthonormal vectors (m, n) that no row of the span has a part along, at most `number` of them."""
    width, rank = rows.basis.shape[1], len(rows.basis)
    wanted = width - rank if number is None else min(number, width - rank)
    vectors = torch.randn(width, wanted, generator=generator, dtype=rows.basis.dtype)
    for _ in range(2):
        vectors = torch.linalg.qr(vectors - rows.basis.T @ (rows.basis @ vectors)).Q
    return vectors.T.contiguous()
