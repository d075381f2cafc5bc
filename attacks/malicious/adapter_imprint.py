"""Read patches from the gradients of adapters that a malicious server has turned into bins.

See attacks/malicious/adapter_server.py for what the rows read. A bin gives a whole token away: its pixels, the tag of
its picture and, by the group of the row, its place. Only the adapters' gradients are used.
"""

import torch
from torch import Tensor

from attacks.malicious.assembly import Pieces, assemble
from attacks.malicious.bins import read_rows
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError


def check_adapter_imprint(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the adapters are a malicious server's and their gradients are shared."""
    if not hasattr(leak.model, "adapter_plan"):
        raise RefusalError(
            f"attack '{attack}' reads adapters that a malicious server has set, and this model has none: use --server "
            f"adapter_imprint --share adapters"
        )
    for name in _names(leak):
        leak.gradient(name, attack)


@checked(check_adapter_imprint, uses=())
def adapter_imprint(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Return pictures put together from the tokens that the bins of the adapters keep apart.

    Hidden patches (MJP) come back without their places, and fill those that are left over. `generator` is not drawn
    from. diagnostics: bins (filled ones), patches (on the grid of 8-bit values), claimed (pictures all of whose patches
    are, with their places), found (pictures returned), exact (all are claimed). Raises UserError by its check.
    """
    model, plan = leak.model, leak.model.adapter_plan
    names = _names(leak)
    weight = torch.cat([leak.gradient(name, "adapter_imprint").cpu() for name in names[::2]])  # (R, D)
    bias = torch.cat([leak.gradient(name, "adapter_imprint").cpu() for name in names[1::2]])
    number, rows = plan.edges.shape
    pieces = [_read(weight[: number * rows], bias[: number * rows], plan, plan.edges, torch.arange(number))]
    if extra := len(plan.unknown_edges):
        some = slice(number * rows, number * rows + extra)
        pieces.append(_read(weight[some], bias[some], plan, plan.unknown_edges[None], torch.tensor([-1])))
    joined = Pieces(*(torch.cat(part) for part in zip(*(vars(one).values() for one in pieces), strict=True)))
    images, whole, certain = assemble(joined, leak.batch_size, model.patch_size, model.grid, leak.mean, leak.std)
    found = len(images)
    if found < leak.batch_size:
        images = torch.cat([images, images.new_zeros(leak.batch_size - found, *leak.image_shape)])
    return Reconstruction(
        images,
        {
            "bins": len(joined.patches),
            "patches": certain,
            "found": found,
            "claimed": whole,
            "exact": whole == leak.batch_size,
        },
    )


def _read(weight: Tensor, bias: Tensor, plan, edges: Tensor, places: Tensor) -> Pieces:
    """Return what G groups of rows give away. edges (G, K); places (G,)."""
    groups = len(edges)
    weight, bias = weight.unflatten(0, (groups, -1)), bias.unflatten(0, (groups, -1))
    hits = read_rows(weight, bias, plan.functional, edges, cumulative=True)
    tokens = hits.inputs
    return Pieces(tokens @ plan.decode.T, tokens @ plan.tag, places[hits.groups], hits.values, hits.weights)


def _names(leak: Leak) -> list[str]:
    """Return the names of weight and bias of the adapters' first layers, block by block."""
    blocks = range(len(leak.model.blocks))
    return [f"blocks.{block}.adapter.down.{part}" for block in blocks for part in ("weight", "bias")]
