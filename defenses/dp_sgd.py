"""DP-SGD: clip the gradient of every image, average, add Gaussian noise (Abadi et al., 2016).

    g~ = 1/B [ sum_i g_i min(1, C / |g_i|) + N(0, (z C)^2) ] + r        over all parameters at once

B counts the examples of an update: over all its accumulated steps and all processes, which share one draw of the noise.
g_i is the gradient of everything in the loss that depends on example i: its cross-entropy and its divergence in a
variational bottleneck. r is the gradient of what depends on no image, the localization loss of the position embeddings,
which is neither clipped nor noised; nor is its head, which no image reaches. Clipping alone only rescales the gradient
of a single image and hides nothing of it.

The guarantee (defenses.accounting) is of the weights, against those who do not know the seed that noise is drawn from.
It needs one image to change the sum by no more than C, so whatever lets an image into several gradients is refused.
The training loss that is logged is not noised and not covered.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defenses.accounting import ACCOUNTANTS, NO_NOISE, extended, guarantee
from defenses.base import Defense, Gradients, Recipe, Step, require
from defenses.capacity import gaussian_bits
from defenses.noise import normal
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DpSgd(Defense):
    strength = "clip"
    clip: float = 1.0
    """Largest norm C of the gradient of one image; 0 turns the defence off."""
    noise_multiplier: float = 1.0
    """Noise z per clipping norm: the sum over the batch gets N(0, (z C)^2)."""
    delta: float = 1e-5
    """Probability with which the guarantee may fail; below 1 / number of training images."""
    accountant: str = "rdp"
    """How Opacus composes the steps: rdp or prv (upper bounds), or gdp, which may understate."""

    def __post_init__(self):
        require(self.clip >= 0, "clip", "0 or more", self.clip)
        require(0 <= self.noise_multiplier < math.inf, "noise_multiplier", "0 or more", self.noise_multiplier)
        bounded = self.clip < math.inf or self.noise_multiplier == 0
        require(bounded, "clip", "finite, as the noise is in units of it", self.clip)
        require(0 < self.delta < 1, "delta", "between 0 and 1", self.delta)
        require(self.accountant in ACCOUNTANTS, "accountant", "rdp, prv or gdp", self.accountant)

    def check(self, model: nn.Module) -> None:
        for name, layer in model.named_modules():
            if self.active and isinstance(layer, _BatchNorm):
                raise UserError(
                    f"defence 'dp_sgd' does not apply to this model: BatchNorm in '{name}' mixes the images of a "
                    f"batch, so there is no gradient per image to clip; use a model without it (vit, deit, swin, lenet)"
                )

    def check_training(self, recipe: Recipe) -> None:
        super().check_training(recipe)
        text = recipe.kind == "text"
        refused = {
            "a mixture puts an image into several of them: set --optim.mixup 0 --optim.cutmix 0": recipe.mixing,
            "repeated augmentation puts an image into several of them: set --augment.repeats 1": recipe.repeats > 1,
            "an unreadable image is replaced by another, which then has two: set --data.on_corrupt error": (
                recipe.on_corrupt != "error"
            ),
            "the localization loss of sentences depends on the lengths of all: set --model.localization none": (
                text and recipe.localization != "none"
            ),
            "a sentence changes how later ones are masked: set --jigsaw.shrinking_window false": (
                text and recipe.shrinking_window
            ),
            "the vocabulary is learned from all sentences: give one with --data.text.tokenizer FILE": (
                text and not recipe.tokenizer and self.noise_multiplier > 0
            ),
            "they are not computed in a compiled step: set --optim.compile false": recipe.compile,
            "they are not computed with recomputed activations: set --optim.grad_checkpointing false": (
                recipe.grad_checkpointing
            ),
        }
        for problem, given in refused.items():
            if self.active and given:
                raise UserError(f"defence 'dp_sgd' clips one gradient per example, and {problem}")

    @property
    def clips_examples(self) -> bool:
        return self.active

    @property
    def guaranteed_noise(self) -> float:
        return self.noise_multiplier if self.active else 0.0

    def gradients(self, gradients: Gradients, step: Step, *, generator: torch.Generator) -> Gradients:
        if not self.active:
            return gradients
        total, _ = self.clipped_sum(step, list(gradients))
        number = len(step.images)
        return self.noised({name: value / number for name, value in total.items()}, number, generator)

    def clipped_sum(self, step: Step, names: list[str]) -> tuple[Gradients, Tensor]:
        """Return the sum over the batch of the clipped gradients by parameter name, and the losses (B,)."""
        each, losses = step.per_example(names, "dp_sgd")
        norms = torch.stack([value.flatten(1).norm(dim=1) for value in each.values()]).norm(dim=0)  # (B,)
        shares = (self.clip / (norms + 1e-6)).clamp_max(1)
        return {name: torch.einsum("b,b...->...", shares.to(value), value) for name, value in each.items()}, losses

    def noised(self, mean: Gradients, number: int, generator: torch.Generator) -> Gradients:
        """Return the mean over `number` examples with the noise of their sum, one draw per entry."""
        if self.noise_multiplier == 0:
            return mean
        scale = self.noise_multiplier * self.clip / number
        return {name: value + scale * normal(value, generator) for name, value in mean.items()}

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the most bits of all images: of each, given the others, one Gaussian channel of power C^2, which is
        less than 1 / (2 z^2) nats. It asks nothing of the gradients."""
        if not self.active or self.noise_multiplier == 0:
            return super().carries(gradients, images)
        entries = sum(value.numel() for value in gradients.values())
        return images * gaussian_bits(1.0, entries, self.noise_multiplier)

    def account(self, sample_rate: float, steps: int, history=()) -> dict:
        if not self.active:
            return super().account(sample_rate, steps, history)
        if self.noise_multiplier == 0 and not history:
            return {"epsilon": None, "privacy": NO_NOISE}
        return guarantee(extended(history, self.noise_multiplier, sample_rate, steps), self.delta, self.accountant)
