"""The order of patches that are known: what the first attention returned tells it under rotary or relative positions,
and borders that continue each other suggest it where nothing else does."""

import math

import torch
from torch import Tensor

from attacks.linear.jigsaw_solver import place, place_all
from attacks.linear.token_equations import TokenEquations
from attacks.threat_model.checks import SAME
from attacks.threat_model.leak import Leak
from models.jigsaw import patchify, shuffle_patches

ARRANGED = 1e-6  # relative squared misfit of what attention returns


@torch.no_grad()
def sees_places(tokens: TokenEquations) -> bool:
    """Return whether the first attention tells patches apart by their places, as rotary and relative positions do."""
    if tokens.prefix is None:
        return False
    first, own = len(tokens.prefix), torch.Generator().manual_seed(0)
    rows = torch.randn(first + tokens.number, len(tokens.embed), generator=own, dtype=torch.float64)[None]
    order = torch.cat([torch.arange(first), torch.arange(tokens.number).flip(0) + first])
    moved, still = tokens.attend(rows[:, order]), tokens.attend(rows)[:, order]
    return bool((moved - still).abs().max() > SAME * still.abs().max())


@torch.no_grad()
def arranged(tokens: TokenEquations, found: Tensor, tries: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return ((N,): the solution that stands in each place, relative squared misfit): the order under which the first
    attention returns to every token what the equations say it did. Best swap at a time, from random orders."""
    block, number = tokens.block, tokens.number
    content, returned = tokens.before(tokens.tokens(found)), tokens.returned(found)
    pairs = torch.combinations(torch.arange(number))
    prefix = tokens.before(tokens.prefix)[None]
    swaps = torch.arange(number).repeat(len(pairs), 1)
    swaps[torch.arange(len(pairs)), pairs[:, 0]], swaps[torch.arange(len(pairs)), pairs[:, 1]] = pairs.T[1], pairs.T[0]
    scale = (returned - returned.mean(dim=0)).square().sum()

    def misfits(orders: Tensor) -> Tensor:
        parts = []
        for some in orders.split(256):
            whole = torch.cat([prefix.expand(len(some), -1, -1), content[some]], dim=1)
            mixed = tokens.attend(block.norm1(whole))[:, -number:]
            parts.append((mixed - returned[some]).square().sum(dim=(1, 2)) / scale)
        return torch.cat(parts)

    best, lowest = torch.arange(number), math.inf
    for _ in range(tries):
        order = torch.randperm(number, generator=generator)
        value = float(misfits(order[None]))
        while True:
            trials = order[swaps]
            errors = misfits(trials)
            if float(errors.min()) >= value:
                break
            order, value = trials[errors.argmin()], float(errors.min())
        if value < lowest:
            best, lowest = order, value
        if lowest < ARRANGED:
            break
    return best, lowest


def order_all_by_borders(leak: Leak, image: Tensor) -> Tensor:
    """Order the patches of an image (1, C, H, W) of which no place is known by how their borders continue."""
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    size = leak.model.patch_size
    pixels = (image * std + mean).nan_to_num().clamp(0, 1)
    order = place_all(patchify(pixels, size)[0], leak.model.grid, size)
    return shuffle_patches(image, order[None], size)


def order_by_borders(leak: Leak, image: Tensor, shared: Tensor, kind: Tensor) -> Tensor:
    """Order patches whose places share a position by how their borders continue those of the others."""
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    for number in kind[shared].unique().tolist():
        pixels = patchify(image * std + mean, leak.model.patch_size)[0]
        order = place(pixels, kind == number, leak.model.grid, leak.model.patch_size)
        image = shuffle_patches(image, order[None], leak.model.patch_size)
    return image
