"""Read the images that an imprint block has kept apart: one division a bin, no optimisation.

The block stands in the model that the server sent (attacks/malicious/imprint_block.py). What a bin holds of one image
is this image; of several, their mixture. An image is claimed as found if its pixels are whole 8-bit values, which
mixtures are not; bins that fail this are returned behind those that pass, the heaviest first.
"""

import math

import torch
from torch import Tensor

from attacks.malicious.assembly import Pieces, assemble, pixels
from attacks.malicious.bins import Hits, distinct, on_grid, read_rows
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError


def check_imprint(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the model holds an imprint block whose gradient is shared."""
    if not hasattr(leak.model, "imprint"):
        raise RefusalError(
            f"attack '{attack}' reads a block that a malicious server plants, and this model has none: use --server "
            f"imprint or trap_weights"
        )
    for part in ("weight", "bias"):
        leak.gradient(f"imprint.{part}", attack)


@checked(check_imprint, uses=())
def imprint(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Return the images of a batch, or of an aggregate, that a malicious server's block has kept apart.

    Images that were not found are the mean of the input's normalisation; `generator` is not drawn from. diagnostics:
    bins (filled ones), found (pictures returned), claimed (of these, on the grid of 8-bit values), exact (all of the
    batch are). Raises UserError by `check_imprint`.
    """
    block = leak.model.imprint
    weight, bias = (leak.gradient(f"imprint.{part}", "imprint").cpu() for part in ("weight", "bias"))
    edges = block.edges if block.sure else torch.full_like(block.edges, -math.inf)
    cumulative = block.structure == "cumulative"
    hits = read_rows(weight[:, block.order], bias[:, block.order], block.functional, edges, cumulative=cumulative)
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
    certain = on_grid(pixels(hits.inputs, leak.mean, leak.std))
    order = sorted(range(len(certain)), key=lambda place: (not certain[place], -float(hits.weights[place])))
    taken = distinct(hits.inputs, order, leak.batch_size)
    return hits.inputs[taken].reshape(-1, *leak.image_shape), int(certain[taken].sum())


def _assembled(leak: Leak, hits: Hits) -> tuple[Tensor, int]:
    """Return pictures put together from patches by the mean of their picture, which each patch carries, and how many of
    them are certain."""
    model = leak.model
    places = hits.groups if model.imprint.reads == "place" else torch.full_like(hits.groups, -1)
    pieces = Pieces(hits.inputs[:, :-1], hits.inputs[:, -1], places, hits.values, hits.weights)
    images, whole, _ = assemble(pieces, leak.batch_size, model.patch_size, model.grid, leak.mean, leak.std)
    return images, whole
