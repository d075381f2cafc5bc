"""What a photograph looks like to an attack on patches: second differences are small but for a few edges."""

import math

import torch
from torch import Tensor, nn

from attacks.threat_model.leak import Leak
from models.jigsaw import unpatchify

SHARP = 0.0025  # second differences below this (pixel range 1) count quadratically, above it linearly


class Smoothness:
    """Robust penalty on the second differences of a picture made of patches: sum of sqrt(d^2 + eps^2).

    Measured against first differences, the same weight for chroma, and a quadratic: see docs/results.md. In pixel
    units (range 1), in luma and two chroma channels, the latter weighted by CHROMA because natural chroma varies less.
    """

    CHROMA = 5.0
    WEIGHTS = (1.0, 1.0, 3.0)  # horizontal, vertical, mixed

    def __init__(self, leak: Leak):
        self.patch, self.grid, channels = leak.model.patch_size, leak.model.grid, leak.image_shape[0]
        colours = torch.eye(channels, dtype=torch.float64)
        if channels == 3:
            colours = nn.functional.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]).double(), dim=1)
            colours[1:] *= self.CHROMA
        self.colours = colours * torch.tensor(leak.std, dtype=torch.float64)

    @staticmethod
    def differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
        return (
            across[..., 1:] - across[..., :-1],
            down[..., 1:, :] - down[..., :-1, :],
            across[..., 1:, :] - across[..., :-1, :],
        )

    def weights(self, absent: Tensor) -> tuple[Tensor, ...]:
        """Return the weight of each second difference, 0 where it touches a patch that is `absent` (N,) bool."""
        gaps = absent.view(1, *self.grid).double().repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        windows = ((1, 3), (3, 1), (2, 2))
        return tuple(
            weight * (1 - nn.functional.max_pool2d(gaps, window, 1))
            for weight, window in zip(self.WEIGHTS, windows, strict=True)
        )

    def __call__(self, patches: Tensor, weights: tuple[Tensor, ...], eps: float) -> Tensor:
        """Return the penalty of patches (N, P), normalised; a scalar, lower is smoother."""
        image = torch.einsum("ij,jhw->ihw", self.colours, unpatchify(patches[None], self.patch, self.grid)[0])
        parts = zip(self.differences(image), weights, strict=True)
        return sum((weight * (part.square() + eps**2).sqrt()).sum() for part, weight in parts)

    def curvature(self, basis: Tensor) -> Tensor:
        """Return (r, r): the quadratic form of one patch on black, in coordinates of the basis (r, P); a
        preconditioner."""
        patches = basis.view(len(basis), -1, self.patch, self.patch)
        parts = self.differences(nn.functional.pad(torch.einsum("ij,kjhw->kihw", self.colours, patches), (2, 2, 2, 2)))
        flat = [part.flatten(1) * math.sqrt(weight) for part, weight in zip(parts, self.WEIGHTS, strict=True)]
        return sum(part @ part.T for part in flat)
