"""What an attacker knows beside the gradients: the range of pixels, and which patches MJP shuffled or hid."""

import math

import torch
from torch import Tensor, nn

from attacks.threat_model.leak import Leak


def pixel_bounds(leak: Leak, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised values of black and white, each (C, 1, 1)."""
    mean, std = (torch.tensor(value, dtype=torch.float64).to(like).view(-1, 1, 1) for value in (leak.mean, leak.std))
    return (0 - mean) / std, (1 - mean) / std


def known_mask(leak: Leak) -> dict[str, Tensor]:
    """Return what the attacker knows of MJP: 'mask' (1, N) to feed the model with, 'source' (1, N) to shuffle with,
    'shuffled_mask' (1, N): patches whose contents may belong elsewhere.

    By `leak.attacker_knowledge`: none of it; from the method, the mask, read off the position-embedding gradient, or
    nothing where that is withheld; the mask, told; the permutation too, which leaves no patch elsewhere. For an
    aggregate of clients, which have a mask each, the rows are (B, N), and the method alone tells nothing.
    """
    if leak.attacker_knowledge == "none":
        return {}
    hides = getattr(leak.model, "hides_positions", False)
    mask = leak.mask if leak.mask is not None or not hides else hidden_rows(leak)
    elsewhere = mask if leak.source is None else None
    rows = {"mask": mask if hides else None, "source": leak.source, "shuffled_mask": elsewhere}
    return {key: value if value.dim() == 2 else value[None] for key, value in rows.items() if value is not None}


def hidden_rows(leak: Leak) -> Tensor | None:
    """Return the mask as the leak gives it away, (N,) bool: patches whose PE gradient is zero or, where a defence left
    no row zero, as large as its noise. None where the PE gradient is withheld, and for the sum over several clients, of
    which each has its own mask. Any batch size; MJP's mask is the batch's.

    All rows with the unknown one sum to the gradient of the patch-embedding bias; what they differ by is the noise.
    Without those two gradients only zero rows count.
    """
    if "pos_embed" not in leak.gradients or leak.aggregate is not None:
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
