"""MixUp as a defence: every image becomes a mixture of `images` of its batch, its label the same mixture of labels.

The first weight belongs to the image itself: Dirichlet(3, 1, ..., 1), drawn again while any weight exceeds `largest`,
as in GradAttack. Only the mixture enters the step, so a perfect attack returns mixtures. InstaHide adds random signs of
the pixels (Huang et al., 2020) and is not offered: it was broken (Carlini et al., 2021). Source: Zhang et al., 2018.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.base import Defense, Recipe, require
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MixUp(Defense):
    strength = "mixed"
    off = 1
    takes_text = False
    mixed: int = 4
    """Images in a mixture; 1 is off."""
    largest: float = 0.65
    """Upper limit of the weight of a single image."""

    def __post_init__(self):
        require(self.mixed >= 1, "mixed", "at least 1", self.mixed)
        require(1 / self.mixed < self.largest <= 1 or self.mixed == 1, "largest", "in (1 / mixed, 1]", self.largest)

    def check_training(self, recipe: Recipe) -> None:
        if self.active and recipe.mixing:
            raise UserError("defence 'mixup' takes the place of the recipe's: set --optim.mixup 0 --optim.cutmix 0")

    def images(
        self, images: Tensor, targets: Tensor, *, generator: torch.Generator, mean, std, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        if self.mixed == 1:
            return images, targets
        number = len(images)
        if number < self.mixed:
            raise UserError(
                f"defence 'mixup' mixes {self.mixed} images of a batch, and this one has {number}: raise the batch "
                f"size or lower --defense_options.mixed"
            )
        weights = torch.stack([self._weights(generator) for _ in range(number)])
        others = torch.stack([torch.randperm(number - 1, generator=generator)[: self.mixed - 1] for _ in range(number)])
        places = torch.arange(number)[:, None]
        chosen = torch.cat([places, (places + 1 + others) % number], dim=1)
        mixing = torch.zeros(number, number).scatter_(1, chosen, weights)
        soft = targets if targets.dim() == 2 else nn.functional.one_hot(targets, num_classes)
        blend = mixing.to(images)
        return torch.einsum("ij,j...->i...", blend, images), blend @ soft.to(images)

    def _weights(self, generator: torch.Generator) -> Tensor:
        """Return (mixed,): one draw of the Dirichlet distribution; Gamma(3) is the sum of three exponential draws."""
        while True:
            draws = torch.empty(self.mixed + 2).exponential_(generator=generator)
            gammas = torch.cat([draws[:3].sum()[None], draws[3:]])
            weights = gammas / gammas.sum()
            if weights.max() <= self.largest:
                return weights
