"""First candidates of a matching attack: drawn, or read off the position-embedding gradient.

Init closed_form: undefended, the solution of attacks/linear/closed_form.py. Where a defence is known to have disturbed
the entries, with standard deviation a on the patch-embedding gradient and b on the rows G (N, D) of the position
embeddings, the equations G^T X = dL/dW of N patches carry the variance a^2 + N b^2 for pixels of variance 1, and the
start is

    argmin over X of  |G^T X - dL/dW|^2 / 2 (a^2 + N b^2)  +  smoothness * (robust second differences of the picture),

the most probable picture by these equations alone: convex, and found within a second.
"""

import math

import torch
from torch import Tensor

from attacks.linear.closed_form import closed_form, token_gradients
from attacks.linear.mjp_patches import minimise
from attacks.linear.smoothness import SHARP, Smoothness
from attacks.threat_model.knowledge import pixel_bounds
from attacks.threat_model.leak import Leak
from models.jigsaw import patchify, unpatchify
from utils.errors import UserError

WEIGHT = "patch_embed.proj.weight"
COLOURS = {
    "light": (1.0, 1.0, 1.0),
    "dark": (0.0, 0.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
}  # levels of a picture of one colour, in [0, 1]
OUTSIDE = 10.0  # weight of squares outside the range of pixels
STEPS = 60  # L-BFGS iterations for each sharpness of the prior


def first_images(leak: Leak, init: str, restarts: int, generator: torch.Generator) -> Tensor:
    """Return initial candidates (restarts, B, C, H, W) float32 in normalised space, by the name of their distribution.

    randn N(0, 1); randn_truncated 0.1 N(0, 1) within 0.1; rand U[-1, 1]; uniform U[0, 1]; zeros. Of Wei et al. (2020):
    patterned-K: a K x K tile of N(0, 1), repeated; light and dark: white and black pictures, red, green and blue: of
    one colour.
    """
    shape = (restarts, leak.batch_size, *leak.image_shape)
    kind, _, side = init.partition("-")
    if kind == "patterned" and side.isdigit() and int(side) > 0 and len(shape) == 5:
        height, width = shape[3:]
        tile = torch.randn(*shape[:3], int(side), int(side), generator=generator)
        return tile.repeat(1, 1, 1, -(-height // int(side)), -(-width // int(side)))[..., :height, :width]
    if init == "randn":
        return torch.randn(shape, generator=generator)
    if init == "randn_truncated":
        return (0.1 * torch.randn(shape, generator=generator)).clamp(-0.1, 0.1)
    if init in ("rand", "uniform"):
        images = torch.rand(shape, generator=generator)
        return images * 2 - 1 if init == "rand" else images
    if init == "zeros":
        return torch.zeros(shape)
    if init in COLOURS and len(shape) == 5:
        if init in ("red", "green", "blue") and shape[2] != 3:
            raise UserError(f"init '{init}' is of pictures in colour, and the images have {shape[2]} channel(s)")
        levels = torch.tensor(COLOURS[init][: shape[2]])
        mean, std = torch.tensor(leak.mean), torch.tensor(leak.std)
        return ((levels - mean) / std).view(-1, 1, 1).expand(shape).clone()
    raise UserError(
        f"unknown init '{init}': choose randn, randn_truncated, rand, uniform, zeros, {', '.join(COLOURS)}, "
        "patterned-PIXELS or closed_form"
    )


def solved_images(
    leak: Leak, restarts: int, spread: dict[str, Tensor], smoothness: float, generator: torch.Generator
) -> Tensor:
    """Return first candidates (restarts, B, C, H, W) float32, normalised, in the range of pixels; the first is the
    solution, the others N(0, 0.1^2) away from it. spread: what a known defence adds to an entry, as a standard
    deviation by parameter name; empty without one. Where positions are hidden or tied, and for several images, there is
    no prior. Raises UserError where the closed form does."""
    patches, table = leak.model.grid[0] * leak.model.grid[1], "pos_embed"
    table = "index_embed" if "index_embed" in leak.gradients else table
    variance = (
        float(spread[WEIGHT]) ** 2 + patches * float(spread[table]) ** 2 if spread.keys() >= {WEIGHT, table} else 0.0
    )
    noise = math.sqrt(variance / (1 + patches))
    found = closed_form(leak, generator=generator, noise=noise, underdetermined=True)
    low, high = (bound.cpu() for bound in pixel_bounds(leak, found.images))
    images = found.images.cpu().clamp(low, high)
    tied = getattr(leak.model, "pos_embed_rows", None) is not None
    if variance and smoothness and leak.batch_size == 1 and not found.diagnostics["hidden"] and not tied:
        images = _most_probable(leak, images, variance, smoothness).clamp(low, high)
    away = torch.randn(restarts, *images.shape, generator=generator) / 10
    away[0] = 0
    return images.float() + away


def _most_probable(leak: Leak, images: Tensor, variance: float, smoothness: float) -> Tensor:
    weight = leak.gradient(WEIGHT, "closed_form").double().cpu().flatten(1)
    rows, penalty = token_gradients(leak)[0], Smoothness(leak)
    low, high = pixel_bounds(leak, rows)
    everywhere = penalty.weights(torch.zeros(len(rows), dtype=torch.bool))

    def objective(columns: Tensor, eps: float) -> Tensor:
        patches = columns.T
        picture = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
        outside = (picture - high).clamp_min(0).square().sum() + (low - picture).clamp_min(0).square().sum()
        misfit = (rows.T @ patches - weight).square().sum() / (2 * variance)
        return misfit + smoothness * penalty(patches, everywhere, eps) + OUTSIDE * outside

    columns = patchify(images.double(), leak.model.patch_size)[0].T.contiguous()  # (P, N)
    for eps in (100 * SHARP, 10 * SHARP, SHARP):
        metric = rows @ rows.T / variance + smoothness / (4 * eps) * torch.eye(len(rows), dtype=rows.dtype)
        columns = minimise(lambda value, eps=eps: objective(value, eps), columns, STEPS, metric[None])
    return unpatchify(columns.T[None], leak.model.patch_size, leak.model.grid)
