"""Where a matching attack starts: first candidates, the range of pixels, and what it knows of labels and puzzle."""

import torch
from torch import Tensor, nn

from attacks.closed_form import hidden_rows
from attacks.labels import attributes_of, recover_labels
from attacks.leak import Leak
from attacks.local_step import multi_label
from utils.errors import UserError


def first_images(leak: Leak, init: str, restarts: int, generator: torch.Generator) -> Tensor:
    """Initial candidates (restarts, B, C, H, W) float32 in normalised space, by the name of their distribution.

    randn N(0, 1); randn_truncated 0.1 N(0, 1) within 0.1; rand U[-1, 1]; uniform U[0, 1]; zeros; patterned-K: a K x K
    tile of N(0, 1), repeated (Wei et al., 2020).
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
    raise UserError(
        f"unknown init '{init}': choose randn, randn_truncated, rand, uniform, zeros, patterned-PIXELS or closed_form"
    )


def first_labels(leak: Leak, rule: str, classes: int, restarts: int, generator: torch.Generator) -> Tensor:
    """Return what stands for the labels (restarts, B, classes): as told, one-hot where they are classes or are
    recovered by `rule`; for 'joint' the logits N(0, 1) of probabilities that are optimised with the images (Zhu et al.,
    2019)."""
    if leak.labels is None and rule == "joint":
        return torch.randn(restarts, leak.batch_size, classes, generator=generator)
    if leak.labels is None and multi_label(leak.model):
        return attributes_of(leak).cpu().expand(restarts, -1, -1)
    labels = leak.labels if leak.labels is not None else recover_labels(leak, rule, generator=generator)
    soft = labels.cpu() if labels.dim() == 2 else nn.functional.one_hot(labels.cpu(), classes).float()
    return soft.expand(restarts, -1, -1)


def pixel_box(leak: Leak, like: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white, each (C, 1, 1)."""
    mean, std = (torch.tensor(value, dtype=torch.float64).to(like).view(-1, 1, 1) for value in (leak.mean, leak.std))
    return (0 - mean) / std, (1 - mean) / std


def known_puzzle(leak: Leak) -> dict[str, Tensor]:
    """Return what the attacker knows of MJP, by tier: 'mask' (1, N) to feed the model with, 'source' (1, N) to shuffle
    with, 'holes' (1, N): patches whose contents may belong elsewhere.

    For an aggregate of clients, which have a mask each, the rows are (B, N), and T1 goes without.

    T0 knows nothing. T1 reads the mask off the position-embedding gradient, and goes without where that is withheld. T2
    is told the mask, T3 the permutation too, which leaves no holes.
    """
    if leak.tier == "T0":
        return {}
    hides = getattr(leak.model, "hides_positions", False)
    mask = leak.mask if leak.mask is not None or not hides else hidden_rows(leak)
    rows = {"mask": mask if hides else None, "source": leak.source, "holes": mask if leak.source is None else None}
    return {key: value if value.dim() == 2 else value[None] for key, value in rows.items() if value is not None}
