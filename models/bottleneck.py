"""The variational bottleneck of PRECODE (Scheliga et al., WACV 2022): noise inside the model, before its head.

Features h (B, F) -> mean and s, K values each; std = softplus(s); b = mean + std * eps, eps ~ N(0, I) anew in every
step; back to F features, which the classifier reads. Training adds weight * KL(b || N(0, I)) in bits. What lies before
the bottleneck is still differentiated exactly, and the layers in front give an image away as without it.
"""

import math

import torch
from torch import Tensor, nn

KL_WEIGHT = 1e-3  # the paper's beta


class VariationalBottleneck(nn.Module):
    """features (B, F) -> (B, F). In evaluation mode the mean is used, so that predictions are reproducible (the
    official code draws there too), unless `noise_seed` is set: then eps comes from that seed in every pass and mode.
    `kl` holds the divergence of the last training pass until it is taken."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.encode, self.decode = nn.Linear(dim, 2 * width), nn.Linear(width, dim)
        self.noise_seed: int | None = None
        self.kl: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        mean, raw = self.encode(features).chunk(2, dim=-1)
        std = nn.functional.softplus(raw)
        if self.training:
            self.kl = divergence(mean, std)
        if self.noise_seed is not None:
            generator = torch.Generator().manual_seed(self.noise_seed)
            return self.decode(mean + std * torch.randn(mean.shape, generator=generator).to(mean))
        return self.decode(mean + std * torch.randn_like(std) if self.training else mean)


class BottleneckedClassifier(nn.Module):
    """A bottleneck and the classifier that reads it."""

    def __init__(self, bottleneck: VariationalBottleneck, classifier: nn.Module):
        super().__init__()
        self.bottleneck, self.classifier = bottleneck, classifier

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.bottleneck(features))


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Return KL of N(mean, std^2) from N(0, 1) in bits, summed over the last dimension, mean over the rest. 0 for (0,
    1)."""
    return (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=-1).mean() / (2 * math.log(2))


def classifier_name(model: nn.Module) -> str:
    """Return the name of the linear layer that reads `model.features`. Raises ValueError for models without a single
    one."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else getattr(model, "fc", None)
    names = [name for name, layer in model.named_modules() if layer is classifier]
    if not isinstance(classifier, nn.Linear) or not names:
        raise ValueError("the model has no single linear layer behind its features")
    return names[0]


def add_bottleneck(model: nn.Module, width: int) -> None:
    """Put a bottleneck of `width` values in front of the model's classifier, in place."""
    name = classifier_name(model)
    parent, _, last = name.rpartition(".")
    classifier = model.get_submodule(name)
    bottleneck = VariationalBottleneck(classifier.in_features, width)
    setattr(model.get_submodule(parent), last, BottleneckedClassifier(bottleneck, classifier))


def bottleneck_of(model: nn.Module) -> VariationalBottleneck | None:
    return next((layer for layer in model.modules() if isinstance(layer, VariationalBottleneck)), None)


def take_penalty(model: nn.Module) -> Tensor | None:
    """Return the weighted divergence of the last training pass, once; None for models without a bottleneck."""
    layer = bottleneck_of(model)
    if layer is None or layer.kl is None:
        return None
    penalty, layer.kl = KL_WEIGHT * layer.kl, None
    return penalty
