"""Gradient pruning (sparsification, top-k): share only the entries of largest magnitude.

Per tensor, as in ATS's and Soteria's baselines and most toolkits, or over all tensors at once (top-k of the whole
update). Nothing is carried over to the next step. An attacker compares the entries that survived (masked_cosine).
Source: Zhu et al., Deep Leakage from Gradients, 2019, section 5; Lin et al., Deep Gradient Compression, ICLR 2018.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.base import Defense, Gradients, Step, require
from defenses.capacity import chosen_bits, stored_bits


@dataclass(frozen=True, kw_only=True)
class Prune(Defense):
    strength = "ratio"
    ratio: float = 0.9
    """Share of the entries that are set to zero, floor(ratio * entries) of them; 0 is off."""
    scope: str = "tensor"
    """tensor: the smallest of each tensor; global: the smallest of all."""

    def __post_init__(self):
        require(0 <= self.ratio < 1, "ratio", "in [0, 1)", self.ratio)
        require(self.scope in ("tensor", "global"), "scope", "tensor or global", self.scope)

    def gradients(self, gradients: Gradients, step: Step | None = None, *, generator: torch.Generator) -> Gradients:
        if self.ratio == 0:
            return gradients
        if self.scope == "tensor":
            return {name: keep_largest(value, self.ratio) for name, value in gradients.items()}
        sizes = [value.numel() for value in gradients.values()]
        kept = keep_largest(torch.cat([value.flatten() for value in gradients.values()]), self.ratio).split(sizes)
        return {name: part.view_as(gradients[name]) for name, part in zip(gradients, kept, strict=True)}

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the bits of the entries that are kept, and of which they are."""
        sizes = [value.numel() for value in gradients.values()]
        sizes = sizes if self.scope == "tensor" else [sum(sizes)]
        kept = [size - int(self.ratio * size) for size in sizes]
        width = stored_bits(gradients.values()) / sum(sizes)
        return sum(width * few + chosen_bits(few, size) for few, size in zip(kept, sizes, strict=True))


def keep_largest(values: Tensor, ratio: float) -> Tensor:
    """Return `values` with the floor(ratio * numel) entries of smallest magnitude at zero."""
    flat = values.flatten()
    smallest = flat.abs().topk(int(ratio * flat.numel()), largest=False).indices
    return flat.index_fill(0, smallest, 0).view_as(values)
