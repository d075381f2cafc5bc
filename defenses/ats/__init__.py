"""Automatic Transformation Search (Gao et al., CVPR 2021; TPAMI 2023): transform every private image before the step.

transforms.py has the library of 50 operations, policies.py the notation and the draws, scores.py the two scores a
search ranks policies by, search.py the search. This file is the defence: a policy as the hook on images.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data.transforms import denormalize
from defenses.ats.policies import parse, transform
from defenses.base import Defense


@dataclass(frozen=True, kw_only=True)
class AutomaticTransformations(Defense):
    strength = "policies"
    off = ""
    takes_text = False
    policies: str = "3-1-7+43-18-18"
    """Policies in the paper's notation: operations joined by '-', applied left to right; '+' joins policies of which
    every image draws one; empty is off. Default: the paper's for CIFAR-100 and ResNet20-4."""
    listed_probability: bool = False
    """Apply each operation with its listed probability; the official code never does, and always applies all."""

    def __post_init__(self):
        parse(self.policies)

    @cached_property
    def parsed(self) -> list[tuple[int, ...]]:
        return parse(self.policies)

    def images(
        self, images: Tensor, targets: Tensor, *, generator: torch.Generator, mean, std, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        if not any(self.parsed):
            return images, targets
        pixels = (denormalize(images, mean, std).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        changed = torch.stack([transform(image, self.parsed, generator, self.listed_probability) for image in pixels])
        shape = (1, -1, 1, 1)
        values = changed.to(images) / 255
        return (values - values.new_tensor(mean).view(shape)) / values.new_tensor(std).view(shape), targets
