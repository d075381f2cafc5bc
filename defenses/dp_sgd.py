"""DP-SGD: clip the gradient of every image, average, add Gaussian noise (Abadi et al., 2016).

    g~ = 1/B [ sum_i g_i min(1, C / |g_i|) + N(0, (z C)^2) ]        over all parameters at once

Clipping alone only rescales the gradient of a single image and hides nothing of it. What the noise guarantees is
accounted by Opacus (optional), which assumes that every image joins a step independently with probability B / n; our
epochs shuffle without replacement, so read epsilon as that of the Poisson-sampled run of the same rate and length.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from defenses.base import Defense, Gradients, Step, require
from defenses.noise import normal
from utils.errors import UserError

NO_OPACUS = "not accounted: Opacus is not installed (pip install opacus)"


@dataclass(frozen=True, kw_only=True)
class DpSgd(Defense):
    strength = "clip"
    looks_at_images = True
    clip: float = 1.0
    """Largest norm C of the gradient of one image; 0 turns the defence off."""
    noise_multiplier: float = 1.0
    """Noise z per clipping norm: the sum over the batch gets N(0, (z C)^2)."""
    delta: float = 1e-5
    """Probability with which the guarantee may fail; below 1 / number of training images."""
    accountant: str = "rdp"
    """How Opacus composes the steps: rdp, prv or gdp."""

    def __post_init__(self):
        require(self.clip >= 0, "clip", "0 or more", self.clip)
        require(self.noise_multiplier >= 0, "noise_multiplier", "0 or more", self.noise_multiplier)
        require(0 < self.delta < 1, "delta", "between 0 and 1", self.delta)
        require(self.accountant in ("rdp", "prv", "gdp"), "accountant", "rdp, prv or gdp", self.accountant)

    def check(self, model: nn.Module) -> None:
        for name, layer in model.named_modules():
            if self.active and isinstance(layer, _BatchNorm):
                raise UserError(
                    f"defence 'dp_sgd' does not apply to this model: BatchNorm in '{name}' mixes the images of a "
                    f"batch, so there is no gradient per image to clip; use a model without it (vit, deit, swin, lenet)"
                )

    def gradients(self, gradients: Gradients, step: Step, *, generator: torch.Generator) -> Gradients:
        if not self.active:
            return gradients
        each = step.per_example(list(gradients), "dp_sgd")
        number = len(step.images)
        norms = torch.stack([value.flatten(1).norm(dim=1) for value in each.values()]).norm(dim=0)
        shares = (self.clip / (norms + 1e-6)).clamp_max(1)
        total = {name: torch.einsum("b,b...->...", shares.to(value), value) for name, value in each.items()}
        noise = self.noise_multiplier * self.clip
        return {
            name: (value + noise * normal(value, generator) if noise else value) / number
            for name, value in total.items()
        }

    def account(self, sample_rate: float, steps: int) -> dict:
        """{"epsilon": of (epsilon, delta)-differential privacy, or null with a line that says why, "delta"}."""
        if not self.active or self.noise_multiplier == 0:
            return {"epsilon": None, "privacy": "no guarantee: no noise"} if self.active else {}
        try:
            from opacus.accountants import create_accountant
        except ImportError:
            return {"epsilon": None, "delta": self.delta, "privacy": NO_OPACUS}
        accountant = create_accountant(self.accountant)
        accountant.history = [(self.noise_multiplier, sample_rate, steps)]
        return {"epsilon": float(accountant.get_epsilon(self.delta)), "delta": self.delta}
