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
from torch import Tensor

from attacks.certified import Certificate, certify
from attacks.exactness import MISFIT, Solution, claim, is_exact, rounding, solve
from attacks.threat_model.checks import PATCHES, check_patches, check_rows, check_tokens, checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from models.jigsaw import unpatchify

BIAS = "patch_embed.proj.bias"
NOISY = 0.1  # relative misfit up to which equations with noise still say how far their solution is off


def check_closed_form(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the equations can be set up and, without `underdetermined`, can determine an image: one
    image, a row of its own for every patch, and fewer patches than embedding dimensions."""
    leak.gradient(PATCHES, attack)
    check_patches(leak, attack)
    check_rows(leak, attack)
    check_tokens(leak, attack)
    if not options.get("underdetermined"):  # an attack built on this one need not have the option
        check_counts(leak, attack)


def check_counts(leak: Leak, attack: str) -> None:
    """Raise UserError where G^T X = dL/dW cannot determine the patches, with the numbers."""
    model, why = leak.model, ""
    patches, dimensions = model.grid[0] * model.grid[1], len(leak.gradients[PATCHES])
    if leak.batch_size != 1:
        why = f"this gradient is the sum over {leak.batch_size} images: use batch_size 1"
    elif getattr(model, "pos_embed_rows", None) is not None:
        why = f"its {patches} patches share {model.pos_embed.shape[1] - model.num_prefix_tokens} position rows"
    elif patches >= dimensions:
        why = (
            f"its {patches} patches are unknown, and {dimensions} embedding dimensions give {dimensions - 1} equations"
        )
    if why:
        rest = "; --attack_options.underdetermined true returns the shortest image that fits" * (
            attack == "closed_form"
        )
        raise RefusalError(f"attack '{attack}' cannot determine the image, as {why}{rest}")


@checked(check_closed_form, uses=())
def closed_form(
    leak: Leak, *, generator: torch.Generator, noise: float = 0.0, underdetermined: bool = False
) -> Reconstruction:
    """Reconstruct the image of a batch of one from the PE and patch-embedding gradients; `generator` is not drawn from.

    Hidden patches are all given the one solution of the unknown row. diagnostics: patches, hidden (zero rows found),
    rank (at the rounding of the leak), unknowns (patch vectors solved for), equations (D per pixel column), residual
    (relative), error (predicted root mean square error of a pixel, range 1; NaN with `noise`), exact
    (attacks/exactness.py). Raises UserError by `check_closed_form`, and for gradients of zero.

    Args:
        noise: Standard deviation of what a defence is known to have added to every entry of the gradient. Both sides of
            the equations carry it; for normalised pixels of variance 1 it acts like noise of variance
            noise^2 (1 + N) on the right side, and the solution becomes the ridge regression that is best for that.
        underdetermined: Also take leaks whose equations cannot determine the image, and return what fits them at the
            least norm: for several images their mixture, once for each; for tied position rows the mixture of those
            that share one.
    """
    model = leak.model
    weight = leak.gradient(PATCHES, "closed_form").double().cpu().flatten(1)  # (D, P)
    rows, hidden = token_gradients(leak)
    known = rows[~hidden]
    if hidden.any():
        unknown = leak.gradient("unknown_pos_embed", "closed_form").double().cpu().reshape(1, -1)
        known = torch.cat([known, unknown])
    for name, gradient in ((PATCHES, weight), ("pos_embed", known)):
        if not gradient.any():
            raise RefusalError(
                f"the gradient of '{name}' is zero everywhere, for all patches: nothing can be read from it"
            )
    eps = rounding((known, weight))
    # The bias is the weight of a pixel that is 1 everywhere: solved for like the others, it shows what scales one
    # gradient and not the other.
    bias = leak.gradient(BIAS, "closed_form").double().cpu()[:, None] if BIAS in leak.gradients else weight[:, :0]
    right = torch.cat([weight, bias], dim=1)
    # Behind LayerNorms every row sums to zero, and so does all that is made of rows: of one image or of many, that
    # equation holds and confirms nothing.
    idle = int((known.sum(dim=1).abs() <= MISFIT * eps * known.norm(dim=1)).all())
    # Equations that ignore hidden patches are wrong by more than rounding: no reason to weigh them by it.
    solution = solve(known.T, right, eps, balance=int(hidden.sum()) <= 1, idle=idle)
    found, error = solution.values[:, : weight.shape[1]], _pixels(leak, solution.error)
    if bias.any():
        error = max(error, _pixels(leak, float((solution.values[:, -1] - 1).square().mean().sqrt())))
    if noise:
        ridge = noise * math.sqrt(1 + len(known)) * torch.eye(len(known), dtype=known.dtype)
        padding = weight.new_zeros(len(known), weight.shape[1])
        system = torch.cat([known.T, ridge]), torch.cat([weight, padding])
        found, error = torch.linalg.lstsq(*system, driver="gelsd").solution, math.nan
    patches = rows.new_zeros(len(rows), weight.shape[1])
    patches[~hidden] = found[: int((~hidden).sum())]
    if hidden.any():
        patches[hidden] = found[-1]
    tied = getattr(model, "pos_embed_rows", None)
    if tied is not None:  # patches that share a row share its solution, a mixture of them
        patches = patches[tied[model.num_prefix_tokens :].cpu() - model.num_prefix_tokens]
    image = unpatchify(patches[None], model.patch_size, model.grid)
    single = leak.batch_size == 1 and tied is None and int(hidden.sum()) <= 1
    holds = is_exact(rank=solution.rank, unknowns=len(known), misfit=solution.misfit, error=error, eps=eps)
    diagnostics = {
        "patches": len(patches),
        "hidden": int(hidden.sum()),
        "rank": solution.rank,
        "unknowns": len(known),
        "equations": len(weight),
        "residual": float((known.T @ found - weight).norm() / weight.norm()),
        "error": error,
        **claim(patches=single and holds, places=True),
    }
    certificate = None
    # Noise is told by what is left over. Omitted entries and steps at other weights are wrong in a way of their own.
    noisy = leak.local is None and bool(known.all()) and solution.misfit < NOISY
    if single and not noise and len(weight) > len(known) == solution.rank and (holds or noisy):
        certificate = _certificate(leak, patches, solution, hidden, biased=bool(bias.any()))
    return Reconstruction(image.expand(leak.batch_size, -1, -1, -1), diagnostics, certificate=certificate)


def _certificate(leak: Leak, patches: Tensor, solution: Solution, hidden: Tensor, biased: bool) -> Certificate | None:
    """Return how far each patch (N, P) can be off, (N,) one of them hidden at most; None where the equations are wrong:
    by them the pixel that is 1 everywhere is not even within its own reach of 1."""
    if biased and bool(((solution.values[:, -1] - 1).abs() > solution.reach).any()):
        return None
    radius = torch.empty(len(hidden), dtype=torch.float64)
    radius[~hidden] = solution.reach[: int((~hidden).sum())]
    radius[hidden] = solution.reach[-1]
    return certify(patches, radius * max(leak.std))


def _pixels(leak: Leak, error: float) -> float:
    """Return an error of normalised pixels in the range from black to white, 1."""
    return error * float(torch.tensor(leak.std, dtype=torch.float64).square().mean().sqrt())


def token_gradients(leak: Leak) -> tuple[Tensor, Tensor]:
    """Return (gradients of the loss by each patch token (N, D) float64, hidden (N,) bool: rows that are exactly zero).

    An index embedding, which masked patches keep, hands over the rows the unknown embedding was meant to hide. Where
    patches share position rows there are fewer rows than patches, each the sum over its patches.
    """
    name = "index_embed" if "index_embed" in leak.gradients else "pos_embed"
    rows = leak.gradient(name, "closed_form")[0].double().cpu()
    patches = leak.model.grid[0] * leak.model.grid[1]
    tied = getattr(leak.model, "pos_embed_rows", None) is not None
    rows = rows[leak.model.num_prefix_tokens :] if tied else rows[-patches:]  # the class token may have no row
    return rows, (rows == 0).all(dim=1) & leak.model.hides_positions
