"""The block that a malicious server puts in front of a network: rows that read its input, bin by bin.

    x' = x + gain * sum_k activation(w_k . c + b_k) * v        for every cell c of the input x

A cell is the whole picture, or one of its patches followed by the mean of its picture, which tells later which patches
belong together. v is one fixed direction of a cell, so that every row gets the same gradient from behind. The rest of
the network stays as it is and sees its input with an error of the size of the gain.

Source: the imprint block of Fowl et al., "Robbing the Fed", ICLR 2022; sparse rows as in their appendix; the trap rows
of Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023.
"""

import torch
from torch import Tensor, nn

from models.jigsaw import patchify, unpatchify

READS = ("image", "patch", "place")
STRUCTURES = ("cumulative", "sparse", "trap")


class ImprintBlock(nn.Module):
    """forward(images (B, C, H, W)) -> the same shape. weight (G, K, P), bias (G, K): K rows in each of G groups, one
    for all cells, or one for each place. The server's secrets, which it does not send: edges (G, K), ascending lower
    thresholds of the bins; functional (P,), what they are of; order (K,), the row of each threshold; sure, whether a
    value read by the functional has to lie in its bin. structure: one of STRUCTURES; reads: one of READS."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        edges: Tensor,
        functional: Tensor,
        reads: str,
        structure: str,
        patch_size: int,
        grid: tuple[int, int],
        gain: float,
        order: Tensor | None = None,
        sure: bool = True,
    ):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.edges, self.functional, self.sure = edges, functional, sure  # no buffers: they are not sent
        self.order = torch.arange(weight.shape[1]) if order is None else order
        self.reads, self.structure, self.patch_size, self.grid, self.gain = reads, structure, patch_size, grid, gain

    def cells(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to (B, 1, C H W), or their patches and the mean of the picture (B, N, C p p + 1)."""
        if self.reads == "image":
            return images.flatten(1)[:, None]
        patches = patchify(images, self.patch_size)
        mean = images.flatten(1).mean(dim=1)[:, None, None].expand(-1, patches.shape[1], 1)
        return torch.cat([patches, mean], dim=2)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.cells(images)
        weight, bias = (value.expand(cells.shape[1], *value.shape[1:]) for value in (self.weight, self.bias))
        values = torch.einsum("bmp,mkp->bmk", cells, weight) + bias
        active = nn.functional.hardtanh(values, 0.0, 1.0) if self.structure == "sparse" else values.relu()
        size = cells.shape[2] - (self.reads != "image")
        added = (self.gain / size**0.5) * active.sum(dim=2, keepdim=True).expand(-1, -1, size)  # (B, M, P)
        if self.reads == "image":
            return images + added.reshape(images.shape)
        return images + unpatchify(added, self.patch_size, self.grid)


def plant(model: nn.Module, block: ImprintBlock) -> nn.Module:
    """Give the model the block as `imprint`, in front of everything else it does. Changes the model in place."""
    model.imprint = block
    model.register_forward_pre_hook(_through)
    return model


def _through(model: nn.Module, inputs: tuple) -> tuple:
    return model.imprint(inputs[0]), *inputs[1:]
