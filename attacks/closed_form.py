"""Closed-form attack on the position-embedding gradient: one least-squares problem, no optimisation.

Tokens enter the first block as z_i = W x_i + b + e_i, with x_i a raw patch and e_i its position embedding. For one
image dL/de_i = dL/dz_i = g_i stands in row i of the PE gradient, and dL/dW = sum_i g_i x_i^T = G^T X. The patches are
X = lstsq(G^T, dL/dW): exact for any ViT with a learned additive PE and fewer patches than embedding dimensions, N < D,
whatever follows. (Not N = D: in a pre-norm ViT every path leads through a LayerNorm, so each g_i sums to zero and G has
rank D - 1 at most.) A naive shuffle is undone up to the order of the patches.

Masked Jigsaw Puzzle breaks it: hidden positions have gradient rows of exactly zero (which gives the mask away) and only
the sum of their g_i reaches the unknown row. The attack then solves for the visible patches with that sum as one more
row; what it ignores ends up in them. This is the naive attacker: it does not use that MJP's structure is known.

Source: derived for this project; docs/method.md. April (Lu et al., CVPR 2022) solves a related system.
"""

import math

import torch
from torch import Tensor, nn

from attacks.leak import Leak, Reconstruction
from models.jigsaw import unpatchify
from utils.errors import UserError


def closed_form(leak: Leak, *, generator: torch.Generator, noise: float = 0.0) -> Reconstruction:
    """Reconstruct the image of a batch of one from the PE and patch-embedding gradients; `generator` is not drawn from.

    noise: standard deviation of what a defence is known to have added to every entry of the gradient. Both sides of the
    equations carry it; for normalised pixels of variance 1 it acts like noise of variance noise^2 (1 + N) on the right
    side, and the solution becomes the ridge regression that is best for that.

    Hidden patches are all given the one solution of the unknown row. diagnostics: patches, hidden (zero rows found),
    rank, unknowns (patch vectors solved for), equations (D per pixel column), residual (relative), exact. With more
    than one image the gradient mixes them: the mixture is returned for each, and `exact` is False.
    """
    model = leak.model
    if "patch_embed.proj.weight" in leak.gradients and not isinstance(
        getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity
    ):
        raise UserError("attack 'closed_form' needs position embeddings added right after the patch projection")
    weight = leak.gradient("patch_embed.proj.weight", "closed_form").double().cpu().flatten(1)  # (D, P)
    rows, hidden = token_gradients(leak)
    known = rows[~hidden]
    if hidden.any():
        unknown = leak.gradient("unknown_pos_embed", "closed_form").double().cpu().reshape(1, -1)
        known = torch.cat([known, unknown])
    if not weight.any() or not known.any():
        raise UserError("the gradients are zero everywhere: nothing can be reconstructed from them")
    scale = torch.ones(known.shape[1], 1, dtype=known.dtype)
    if hidden.sum() <= 1:
        # Only rounding stands between the equations and the image. It grows with the terms an equation sums; weighing
        # by that gains about 3 dB. Equations that ignore hidden patches are wrong by more than rounding.
        scale = 1 / known.abs().sum(dim=0).clamp_min(torch.finfo(known.dtype).tiny)[:, None]
    system, right = known.T * scale, weight * scale
    if noise:
        ridge = noise * math.sqrt(1 + len(known)) * torch.eye(len(known), dtype=known.dtype)
        system, right = torch.cat([known.T, ridge]), torch.cat([weight, weight.new_zeros(len(known), weight.shape[1])])
    solution = torch.linalg.lstsq(system, right, driver="gelsd")
    patches = rows.new_zeros(len(rows), weight.shape[1])
    patches[~hidden] = solution.solution[: int((~hidden).sum())]
    if hidden.any():
        patches[hidden] = solution.solution[-1]
    tied = getattr(model, "pos_embed_rows", None)
    if tied is not None:  # patches that share a row share its solution, a mixture of them
        patches = patches[tied[model.num_prefix_tokens :].cpu() - model.num_prefix_tokens]
    residual = (known.T @ solution.solution - weight).norm() / weight.norm()
    image = unpatchify(patches[None], model.patch_size, model.grid)
    rank, unknowns = int(solution.rank), len(known)
    diagnostics = {
        "patches": len(patches),
        "hidden": int(hidden.sum()),
        "rank": rank,
        "unknowns": unknowns,
        "equations": len(weight),
        "residual": float(residual),
        "exact": leak.batch_size == 1
        and not noise
        and leak.local is None
        and rank == unknowns
        and int(hidden.sum()) <= 1
        and tied is None,
    }
    return Reconstruction(image.expand(leak.batch_size, -1, -1, -1), diagnostics)


def token_gradients(leak: Leak) -> tuple[Tensor, Tensor]:
    """(gradients of the loss by each patch token (N, D) float64, hidden (N,) bool: rows that are exactly zero).

    An index embedding, which masked patches keep, hands over the rows the unknown embedding was meant to hide. Where
    patches share position rows there are fewer rows than patches, each the sum over its patches.
    """
    name = "index_embed" if "index_embed" in leak.gradients else "pos_embed"
    rows = leak.gradient(name, "closed_form")[0].double().cpu()
    patches = leak.model.grid[0] * leak.model.grid[1]
    tied = getattr(leak.model, "pos_embed_rows", None) is not None
    rows = rows[leak.model.num_prefix_tokens :] if tied else rows[-patches:]  # the class token may have no row
    return rows, (rows == 0).all(dim=1) & leak.model.hides_positions


def hidden_rows(leak: Leak) -> Tensor | None:
    """The mask as the leak gives it away, (N,) bool: patches whose PE gradient is zero or, where a defence left no row
    zero, as large as its noise. None where the PE gradient is withheld. Any batch size; MJP's mask is the batch's.

    All rows with the unknown one sum to the gradient of the patch-embedding bias; what they differ by is the noise.
    Without those two gradients only zero rows count.
    """
    if "pos_embed" not in leak.gradients:
        return None
    rows = leak.gradients["pos_embed"][0, -leak.model.grid[0] * leak.model.grid[1] :]
    zero = rows.eq(0).all(dim=1)
    normed = not isinstance(getattr(leak.model.patch_embed, "norm", nn.Identity()), nn.Identity)
    last = "patch_embed.norm.bias" if normed else "patch_embed.proj.bias"
    totals = [leak.gradients.get(name) for name in ("unknown_pos_embed", last)]
    if zero.any() or any(value is None for value in totals):
        return zero
    rows, (unknown, bias) = rows.double(), (value.double().flatten() for value in totals)
    power = (rows.sum(dim=0) + unknown - bias).square().sum() / (len(rows) + 2)  # of a row of noise alone
    return rows.square().sum(dim=1) < power * (1 + 6 * math.sqrt(2 / rows.shape[1]))
