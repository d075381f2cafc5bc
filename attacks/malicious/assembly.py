"""From single patches back to pictures: those that carry the same tag are of one picture."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.malicious.bins import on_grid
from models.jigsaw import unpatchify

SAME = 1e-4  # difference of two read tags, in parts of the largest, up to which two patches are of one picture


@dataclass(frozen=True)
class Pieces:
    """Patches as bins gave them away. patches (F, P) normalised pixels; tags (F,): equal for patches of one picture;
    places (F,) int64, -1 where unknown; values (F,): their functional; weights (F,): how much each adds to the leak."""

    patches: Tensor
    tags: Tensor
    places: Tensor
    values: Tensor
    weights: Tensor


def pixels(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return normalised pixels (F, C * area) in the range from black to white, 0 to 1."""
    mean, std = (torch.tensor(value, dtype=inputs.dtype) for value in (mean, std))
    return (inputs.unflatten(1, (len(mean), -1)) * std[:, None] + mean[:, None]).flatten(1)


def assemble(
    pieces: Pieces, most: int, patch_size: int, grid: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, int, int]:
    """Return (pictures (n, C, H, W) of at most `most`, how many of them are certain, how many patches are).

    Patches without a place fill the places that are left over, by ascending functional. A patch is certain if it is on
    the grid of 8-bit values; a picture, if each of its places holds a certain patch whose place is known.
    """
    number = grid[0] * grid[1]
    certain = on_grid(pixels(pieces.patches, mean, std))
    tolerance = SAME * float(pieces.tags.abs().max()) if len(pieces.tags) else 0.0
    groups = sorted(cluster(pieces.tags, tolerance), key=lambda rows: (-int(certain[rows].sum()), -len(rows)))[:most]
    canvas = pieces.patches.new_zeros(len(groups), number, pieces.patches.shape[1])  # (n, N, P)
    whole = 0
    for image, rows in enumerate(groups):
        rows = sorted(rows, key=lambda row: (bool(certain[row]), float(pieces.weights[row])))  # the best come last
        placed = {int(pieces.places[row]): row for row in rows if pieces.places[row] >= 0}
        free = [place for place in range(number) if place not in placed]
        loose = [row for row in rows if pieces.places[row] < 0][-len(free) :] if free else []
        loose.sort(key=lambda row: float(pieces.values[row]))
        for place, row in [*placed.items(), *zip(free, loose, strict=False)]:
            canvas[image, place] = pieces.patches[row]
        whole += len(placed) == number and bool(certain[list(placed.values())].all())
    return unpatchify(canvas, patch_size, grid), whole, int(certain.sum())


def cluster(values: Tensor, tolerance: float) -> list[list[int]]:
    """Return the places of values (F,) in groups in which neighbours differ by no more than `tolerance`."""
    groups: list[list[int]] = []
    last = None
    for place in values.argsort().tolist():
        value = float(values[place])
        if last is None or value - last > tolerance:
            groups.append([])
        groups[-1].append(place)
        last = value
    return groups
