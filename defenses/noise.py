"""Gaussian noise on the shared gradients, the plainest defence (Zhu et al., Deep Leakage from Gradients, 2019)."""

import torch
from torch import Tensor


def noise(gradients: dict[str, Tensor], *, generator: torch.Generator, std: float = 1e-3) -> dict[str, Tensor]:
    """Add N(0, std^2) to every entry, std in units of the gradient; 0 changes nothing. `generator` lives on the CPU."""
    if std == 0:
        return gradients
    return {
        name: value + std * torch.randn(value.shape, generator=generator).to(value) for name, value in gradients.items()
    }
