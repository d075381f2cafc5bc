"""Localization: regress where patches or tokens stand from their position embeddings alone.

A regulariser of the PE table (MJP, CVPR 2023): its loss does not depend on the images. Dense absolute localization
(DAL) finds the grid position of each visible patch, C = 2 coordinates, or C = 1 for the tokens of a sentence. Kinds:
'linear' D -> C; 'nonlinear' D -> D, ReLU, -> C (the paper's); 'pca' projects onto the first C principal components,
centred and with signs fixed; 'pca_official' as published: uncentred projection, arbitrary signs. 'relative' is what the
follow-up (TPAMI 2025) trains on sentences: the signed offset of two visible tokens of a window from the difference of
their PEs, D -> D, ReLU, -> C.
"""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.position import grid_coordinates
from utils.errors import look_up


def linear_head(dim: int, coordinates: int = 2) -> nn.Module:
    return nn.Linear(dim, coordinates)


def nonlinear_head(dim: int, coordinates: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, coordinates))


LOCALIZATION_HEADS = {
    "linear": linear_head,
    "nonlinear": nonlinear_head,
    "pca": None,
    "pca_official": None,
    "relative": nonlinear_head,
}


class Localization(nn.Module):
    """Predicts where every patch of a grid (rows, columns), or token of a line (places,), stands; scores the visible.

    unit_targets False regresses raw integers 0..rows-1 as the official code does; True scales them to [0, 1]
    (then multiply the loss weight by about rows - 1 for the same pull). window: 'relative' compares the places of the
    same `window` consecutive ones, counted in row-major order, each with each.
    """

    def __init__(self, kind: str, dim: int, grid: tuple[int, ...], unit_targets: bool = False, window: int = 16):
        super().__init__()
        head = look_up(LOCALIZATION_HEADS, kind, "localization head")
        self.kind = kind
        self.layers = head(dim, len(grid)) if head else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        target = grid_coordinates(grid)
        if unit_targets:
            target = target / (torch.tensor(grid) - 1).clamp(min=1)
        pairs = None
        if kind == "relative":
            windows = [range(start, min(start + window, len(target))) for start in range(0, len(target), window)]
            both = [(one, other) for places in windows for one in places for other in places if one != other]
            pairs = torch.tensor(both).reshape(-1, 2).T  # (2, pairs)
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of the visible patches: PE rows (N, D), mask (1 or B, N) bool -> mean absolute error, a
        scalar.

        0 when every patch is hidden. The mean runs over all visible (mask, patch, coordinate) triples; a pair is
        visible when both of its patches are. The published code draws one partner per token: this is its expectation.
        """
        if self.pairs is not None:
            one, other = self.pairs
            offsets = self.target[one] - self.target[other]
            return self._error(self.layers(rows[one] - rows[other]), mask[:, one] | mask[:, other], offsets)
        if self.layers is None:
            predicted = torch.stack([self._project(rows, hidden) for hidden in mask])
            return self._error(predicted, mask, self.target)
        return self._error(self.layers(rows), mask, self.target)

    def _error(self, predicted: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        visible = (~mask).to(predicted.dtype)
        error = (predicted - target.to(predicted.dtype)).abs().mean(dim=-1)
        return (visible * error).sum() / visible.sum().clamp(min=1)

    def _project(self, rows: Tensor, hidden: Tensor) -> Tensor:
        visible = (~hidden).to(rows.dtype)[:, None]
        number = visible.sum().clamp(min=1)
        centred = (rows - (visible * rows).sum(0) / number) * visible
        components = _principal_axes(centred, self.target.shape[1])
        if self.kind == "pca_official":
            return rows @ components
        target = self.target.to(rows.dtype)
        middle = (visible * target).sum(0) / number
        scores = centred @ components
        signs = torch.sign((scores * (target - middle)).sum(0).detach())
        return scores * signs + middle


def _principal_axes(centred: Tensor, number: int) -> Tensor:
    """Return the first `number` principal axes of centred rows (N, D), as columns (D, number), with gradient.

    The derivative of an SVD divides by the gaps between all singular values, and hidden rows make many of them zero.
    That of an axis v needs only the gaps to its own eigenvalue e: dv = (e I - C)^+ dC v with C the scatter matrix.
    """
    with torch.no_grad():
        scatter = centred.T @ centred
        values, vectors = torch.linalg.eigh(scatter)
        gaps = values[-number:].flip(0)[:, None] - values  # (number, D)
        small = gaps.abs() <= values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(small, 0, 1 / torch.where(small, 1, gaps))
        axes = vectors[:, -number:].flip(1)
    change = vectors.T @ (centred.T @ (centred @ axes))  # (D, number), value: eigenvalue on the axis itself, else 0
    return axes + vectors @ (inverse.T * change)
