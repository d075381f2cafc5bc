"""Soteria: perturb the representation in front of the classifier, so that it says little about the image.

With r (B, F) what the last linear layer reads, the gradient of that layer's weight loses its columns of the features
whose score is lowest,

    score_f = sum over the batch of |d r_f / d x|_2 / (|r_f| + 0.1),

the ratio by which the paper approximates |r_f (dr_f/dx)^-1|; all other gradients stay as they are. So whoever attacks
the first layers, or leaves the last one out, is not disturbed. Source: Sun et al., CVPR 2021; `signed` divides by
r_f + 0.1 and compares magnitudes, as its code does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.base import Defense, Gradients, Step, require
from models.bottleneck import classifier_name
from utils.errors import UserError

OFFSET = 0.1
CHUNK = 32  # features differentiated at once


@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    strength = "percent"
    looks_at_images = True
    takes_text = False
    percent: float = 60.0
    """Features whose column is set to zero, in percent; 0 is off."""
    sample: int = 0
    """Images whose derivatives are scored, to save time in training; 0 is all (one backward pass per feature)."""
    signed: bool = False
    """Divide by r_f + 0.1 instead of |r_f| + 0.1, as the official code does."""

    def __post_init__(self):
        require(0 <= self.percent < 100, "percent", "in [0, 100)", self.percent)
        require(self.sample >= 0, "sample", "0 or more", self.sample)

    def check(self, model: nn.Module) -> None:
        if self.active:
            last_linear(model)

    def gradients(self, gradients: Gradients, step: Step, *, generator: torch.Generator) -> Gradients:
        if not self.active:
            return gradients
        name = f"{last_linear(step.model)}.weight"
        if name not in gradients:
            return gradients
        score = self.scores(step)
        kept = score >= torch.quantile(score, self.percent / 100)
        return gradients | {name: gradients[name] * kept.to(gradients[name])}

    def scores(self, step: Step) -> Tensor:
        """Return (F,): how much each feature moves with the image, relative to its size."""
        number = self.sample or len(step.images)
        images = step.images[:number].detach().requires_grad_()
        mask = step.mask if step.mask is None or len(step.mask) == 1 else step.mask[:number]
        training = step.model.training
        step.model.eval()  # a second pass must not move BatchNorm's statistics
        with torch.enable_grad():
            features = step.model.features(*(images,) if mask is None else (images, mask))
        step.model.train(training)
        total, columns = features.sum(dim=0), torch.eye(features.shape[1]).to(features)
        norms = []
        for chosen in columns.split(CHUNK):
            found = torch.autograd.grad(total, images, chosen, retain_graph=True, is_grads_batched=True)[0]
            norms.append(found.flatten(2).norm(dim=2))
        size = features.detach() + OFFSET if self.signed else features.detach().abs() + OFFSET
        return (torch.cat(norms).T / size).sum(dim=0).abs()


def last_linear(model: nn.Module) -> str:
    """Return the name of the linear layer that reads `model.features`. Raises UserError for models without one."""
    try:
        return classifier_name(model)
    except ValueError as error:
        raise UserError(f"defence 'soteria' does not apply to this model: {error}") from error
