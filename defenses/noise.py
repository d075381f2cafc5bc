"""Noise on the shared gradients, the plainest defence (Zhu et al., Deep Leakage from Gradients, 2019).

Every entry gets its own draw at every step; nothing is clipped, so this alone guarantees nothing. The attacker's best
distance is the squared error for Gaussian noise and the absolute error for Laplacian noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.base import Defense, Gradients, Step, require
from defenses.capacity import gaussian_bits, laplacian_bits


@dataclass(frozen=True, kw_only=True)
class Noise(Defense):
    strength = "std"
    std: float = 1e-3
    """Standard deviation of the Gaussian noise, in units of the gradient; 0 is off."""

    def __post_init__(self):
        require(self.std >= 0, "std", "0 or more", self.std)

    def gradients(self, gradients: Gradients, step: Step | None = None, *, generator: torch.Generator) -> Gradients:
        if self.std == 0:
            return gradients
        return {name: value + self.std * normal(value, generator) for name, value in gradients.items()}

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the capacity of the Gaussian channels of all tensors."""
        if self.std == 0:
            return super().carries(gradients, images)
        return sum(gaussian_bits(*tensor, self.std) for tensor in powers(gradients))


@dataclass(frozen=True, kw_only=True)
class Laplace(Defense):
    strength = "scale"
    scale: float = 1e-3
    """Scale b of the Laplacian noise, whose variance is 2 b^2, in units of the gradient; 0 is off."""

    def __post_init__(self):
        require(self.scale >= 0, "scale", "0 or more", self.scale)

    def gradients(self, gradients: Gradients, step: Step | None = None, *, generator: torch.Generator) -> Gradients:
        if self.scale == 0:
            return gradients
        return {name: value + self.scale * laplacian(value, generator) for name, value in gradients.items()}

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the largest divergences from noise alone of all tensors."""
        if self.scale == 0:
            return super().carries(gradients, images)
        return sum(laplacian_bits(*tensor, self.scale) for tensor in powers(gradients))


def powers(gradients: Gradients) -> list[tuple[float, int]]:
    """Return (sum of squares, number of entries) of every tensor."""
    return [(float(value.double().square().sum()), value.numel()) for value in gradients.values()]


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return N(0, 1) of the shape, type and device of `like`, drawn on the CPU, with as many digits as `like` has:
    what is added with fewer leaves the last digits of a gradient as they are (Mironov, CCS 2012)."""
    return torch.randn(like.shape, generator=generator, dtype=_drawn(like)).to(like)


def laplacian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return Lap(0, 1), as `normal`: the difference of two exponential draws."""
    first, second = (torch.empty(like.shape, dtype=_drawn(like)).exponential_(generator=generator) for _ in range(2))
    return (first - second).to(like)


def _drawn(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
