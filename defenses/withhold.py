"""Withheld gradients: what is not shared cannot be read, and is not trained either.

The published answer to attacks on position embeddings is to keep their gradient at home (Lu et al., APRIL, CVPR 2022).
The server then never updates these parameters: they stay as initialised, which is what training with this does.
"""

from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from defenses.base import Defense, Gradients, Step
from utils.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Withhold(Defense):
    strength = "names"
    off = ""
    names: str = "pos_embed"
    """Parameters whose gradients stay at home: names or patterns, separated by commas; empty is off."""

    def check(self, model: nn.Module) -> None:
        known = [name for name, _ in model.named_parameters()]
        for pattern in self.withheld():
            if not any(fnmatch(name, pattern) for name in known):
                raise UserError(
                    f"defence 'withhold' does not apply to this model: '{pattern}' names none of its parameters, "
                    f"{did_you_mean(pattern, known)}"
                )

    def gradients(self, gradients: Gradients, step: Step | None = None, *, generator: torch.Generator) -> Gradients:
        if not self.withheld():
            return gradients
        return {
            name: value
            for name, value in gradients.items()
            if not any(fnmatch(name, pattern) for pattern in self.withheld())
        }

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the bits of what is left."""
        return super().carries(self.gradients(gradients, generator=torch.Generator()), images)

    def withheld(self) -> list[str]:
        return [name.strip() for name in self.names.split(",") if name.strip()]
