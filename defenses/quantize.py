"""Quantised gradients: few bits per entry, down to the sign alone.

1 bit shares sign(g) times the mean magnitude of its tensor (signSGD with a scale: Bernstein et al., 2018; Karimireddy
et al., 2019). b > 1 bits share the nearest of 2^b - 1 levels, symmetric around zero and evenly spaced up to the largest
magnitude of the tensor, or a random neighbour whose mean is the entry itself (QSGD, Alistarh et al., 2017).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.base import Defense, Gradients, Step, require


@dataclass(frozen=True, kw_only=True)
class Quantize(Defense):
    strength = "bits"
    bits: int = 8
    """Bits per entry, 1 is the sign; 0 is off (full precision)."""
    rounding: str = "nearest"
    """nearest, or stochastic: unbiased, for 2 bits and more."""

    def __post_init__(self):
        require(0 <= self.bits <= 16, "bits", "from 0 to 16", self.bits)
        require(self.rounding in ("nearest", "stochastic"), "rounding", "nearest or stochastic", self.rounding)
        require(self.rounding == "nearest" or self.bits != 1, "rounding", "nearest for 1 bit", self.rounding)

    def gradients(self, gradients: Gradients, step: Step | None = None, *, generator: torch.Generator) -> Gradients:
        if self.bits == 0:
            return gradients
        return {name: self._rounded(value, generator) for name, value in gradients.items()}

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the bits of the levels, of which 1 bit has three, as a sign may be 0, and of a scale per tensor."""
        if self.bits == 0:
            return super().carries(gradients, images)
        levels = 3 if self.bits == 1 else 2**self.bits - 1
        number = sum(value.numel() for value in gradients.values())
        return number * math.log2(levels) + sum(8 * value.element_size() for value in gradients.values())

    def _rounded(self, values: Tensor, generator: torch.Generator) -> Tensor:
        if self.bits == 1:
            return values.sign() * values.abs().mean()
        spacing = values.abs().amax() / (2 ** (self.bits - 1) - 1)
        if spacing == 0:
            return values
        places = values / spacing
        if self.rounding == "stochastic":
            return (places + torch.rand(values.shape, generator=generator).to(values)).floor() * spacing
        return places.round() * spacing
