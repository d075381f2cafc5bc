"""Read the images that an imprint block has kept apart: one division a bin, no optimisation.

The block stands in the model that the server sent (attacks/malicious/imprint_block.py). What a bin holds of one image
is this image; of several, their mixture. An image is claimed as found if its pixels are whole 8-bit values, which
mixtures are not; bins that fail this are returned behind those that pass, the heaviest first.
"""

import torch
from torch import Tensor

from attacks.checks import checked
from attacks.leak import Leak, Reconstruction
from attacks.malicious.bins import Hits, distinct, on_grid, read_rows
from models.jigsaw import unpatchify
from utils.errors import UserError

SAME_IMAGE = 1e-4  # relative difference of two read picture means up to which two patches are of one image


def check_imprint(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the model holds an imprint block whose gradient is shared."""
    if not hasattr(leak.model, "imprint"):
        raise UserError(
            f"attack '{attack}' reads a block that a malicious server plants, and this model has none: use --server "
            f"imprint or trap_weights"
        )
    for part in ("weight", "bias"):
        leak.gradient(f"imprint.{part}", attack)


@checked(check_imprint)
def imprint(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Return the images of a batch, or of an aggregate, that a malicious server's block has kept apart.

    Images that were not found are the mean of the input's normalisation; `generator` is not drawn from. diagnostics:
    bins (filled ones), found (pictures returned), claimed (of these, on the grid of 8-bit values), exact (all of the
    batch are). Raises UserError by `check_imprint`.
    """
    block = leak.model.imprint
    weight, bias = (leak.gradient(f"imprint.{part}", "imprint").cpu() for part in ("weight", "bias"))
    cumulative = block.structure == "cumulative"
    hits = read_rows(weight, bias, block.functional, block.edges, cumulative=cumulative)
    images, claimed = (_whole if block.reads == "image" else _assembled)(leak, hits)
    found = len(images)
    missing = leak.batch_size - found
    if missing > 0:
        images = torch.cat([images, images.new_zeros(missing, *leak.image_shape)])
    diagnostics = {
        "bins": len(hits.inputs),
        "found": found,
        "claimed": claimed,
        "exact": claimed == leak.batch_size,
    }
    return Reconstruction(images, diagnostics)


def _whole(leak: Leak, hits: Hits) -> tuple[Tensor, int]:
    """Return up to B different pictures (F, C, H, W), those on the grid first, and how many of them are."""
    certain = on_grid(_pixels(leak, hits.inputs))
    order = sorted(range(len(certain)), key=lambda place: (not certain[place], -float(hits.weights[place])))
    taken = distinct(hits.inputs, order, leak.batch_size)
    return hits.inputs[taken].reshape(-1, *leak.image_shape), int(certain[taken].sum())


def _assembled(leak: Leak, hits: Hits) -> tuple[Tensor, int]:
    """Return pictures put together from patches by the mean of their picture, which each patch carries, and how many of
    them have all their patches on the grid.

    Rows without places do not say where a patch stands: those of a picture are then filled in by ascending functional.
    """
    block, number = leak.model.imprint, leak.model.grid[0] * leak.model.grid[1]
    patches, means = hits.inputs[:, :-1], hits.inputs[:, -1]
    certain = on_grid(_pixels(leak, patches))
    clusters = cluster(means, SAME_IMAGE * float(means.abs().max()) if len(means) else 0.0)
    clusters = sorted(clusters, key=lambda rows: (-int(certain[rows].sum()), -len(rows)))[: leak.batch_size]
    canvas = patches.new_zeros(len(clusters), number, patches.shape[1])  # (F, N, P)
    whole = 0
    for image, rows in enumerate(clusters):
        # Later ones win: patches on the grid over mixtures, heavier ones over lighter ones.
        rows = sorted(rows, key=lambda row: (bool(certain[row]), float(hits.weights[row])))
        if block.reads == "place":
            for row in rows:
                canvas[image, hits.groups[row]] = patches[row]
            whole += len({int(hits.groups[row]) for row in rows if certain[row]}) == number
        else:
            chosen = sorted(rows[-number:], key=lambda row: float(hits.values[row]))
            canvas[image, : len(chosen)] = patches[chosen]
            whole += len(chosen) == number and bool(certain[chosen].all())
    return unpatchify(canvas, leak.model.patch_size, leak.model.grid), whole


def cluster(values: Tensor, tolerance: float) -> list[list[int]]:
    """Return the places of values (F,) in groups of which neighbours differ by no more than `tolerance`."""
    groups: list[list[int]] = []
    last = None
    for place in values.argsort().tolist():
        value = float(values[place])
        if last is None or value - last > tolerance:
            groups.append([])
        groups[-1].append(place)
        last = value
    return groups


def _pixels(leak: Leak, inputs: Tensor) -> Tensor:
    """Return normalised pixels (F, C * area) in the range from black to white, 0 to 1."""
    mean, std = (torch.tensor(value, dtype=inputs.dtype) for value in (leak.mean, leak.std))
    split = inputs.reshape(len(inputs), len(mean), -1)
    return (split * std[:, None] + mean[:, None]).flatten(1)
