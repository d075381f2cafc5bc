"""Servers that change the classifier so that one image alone reaches the rest of the network.

With the weights of all classes but c at zero, an image passes (p_c - y_c) W_c back to its features: p its
probabilities, y its label. Where p_c - y_c is zero, nothing of the image reaches any layer in front of the classifier.

    class      b_j = margin for all j but c: p_c = 0, so p_c - y_c = -1 for images of class c and 0 for all others
    feature    W_c = m v, b_c = -m theta: p_c is 1 where a feature v . f exceeds theta, else 0. If no image is of class
               c, those above theta alone pass something back: one of them, where theta is the right quantile

How many images pass is read from the leak: B times the gradient of b_c is the sum of p_c - y_c.

Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via Gradient Magnification", ICML 2022.
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from attacks.label_recovery import classifier_of
from attacks.malicious.bins import expected_share
from attacks.malicious.server import Knowledge, Server, require
from utils.errors import UserError


@dataclass(frozen=True)
class Bait:
    """What a fishing server remembers. layer: name of the classifier; target: its class; sign: of p_c - y_c for the
    images that pass."""

    layer: str
    target: int
    sign: int


@dataclass(frozen=True, kw_only=True)
class _Fishing(Server):
    power = "malicious_parameters"
    attack = "fishing"
    target: int = 0
    """Class c, as a number."""
    kept: float = 0.0
    """Share of the other classes' weights that stays: less conspicuous, and so much of the other images passes."""
    sign: ClassVar[int] = -1

    def check(self, model: nn.Module) -> None:
        if hasattr(model, "vocab_size"):
            raise UserError("this server changes models of images, and this one is of sentences")
        layer = model.get_submodule(classifier_of(model, _shape(model)))
        if layer.bias is None:
            raise UserError("a server fishes by the bias of the classifier, and this one has none")
        require(
            0 <= self.target < layer.out_features, "target", f"below {layer.out_features}, the classes", self.target
        )

    def _prepared(self, model: nn.Module) -> tuple[nn.Module, nn.Linear]:
        """Return a copy that remembers its bait, and its classifier with every weight at zero but those of class c."""
        self.check(model)
        model = copy.deepcopy(model)
        name = classifier_of(model, _shape(model))
        model.bait = Bait(name, self.target, self.sign)
        layer = model.get_submodule(name)
        with torch.no_grad():
            own = layer.weight[self.target].clone()
            layer.weight.mul_(self.kept)
            layer.weight[self.target] = own
        return model, layer


@dataclass(frozen=True, kw_only=True)
class ClassFishing(_Fishing):
    margin: float = 1000.0
    """Logit of every other class. From about 100 on exp(-margin) is zero in single precision."""

    def __post_init__(self):
        require(self.target >= 0, "target", "0 or more", self.target)
        require(0 <= self.kept <= 1, "kept", "from 0 to 1", self.kept)
        require(0 < self.margin < math.inf, "margin", "above 0 and finite", self.margin)

    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        model, layer = self._prepared(model)
        with torch.no_grad():
            kept = float(layer.bias[self.target])
            layer.bias.fill_(self.margin)
            layer.bias[self.target] = kept
        return model

    def guarantee(self, images: int, public: int | None = None, *, classes: int | None = None) -> float | None:
        """Return the share of `images`, of labels drawn evenly from so many classes, that pass alone."""
        return None if classes is None else expected_share([1 / classes], images)


@dataclass(frozen=True, kw_only=True)
class FeatureFishing(_Fishing):
    sign: ClassVar[int] = 1
    expected_images: int = 64
    """Images behind the leak, over all clients: the threshold is the quantile that one of them exceeds."""
    slope: float = 3000.0
    """Steepness m of the logit, per standard deviation of the feature."""

    def __post_init__(self):
        require(self.target >= 0, "target", "0 or more", self.target)
        require(0 <= self.kept <= 1, "kept", "from 0 to 1", self.kept)
        require(self.expected_images >= 1, "expected_images", "1 or more", self.expected_images)
        require(0 < self.slope < math.inf, "slope", "above 0 and finite", self.slope)

    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        if knowledge.public is None:
            raise UserError("server 'feature_fishing' reads a quantile of public pictures: give --server_images DIR")
        features = _features(model, knowledge).double()  # (M, F)
        model, layer = self._prepared(model)
        axis = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False).Vh[0]
        values = features @ axis
        threshold = torch.quantile(values, 1 - 1 / self.expected_images)
        steep = self.slope / float(values.std())
        with torch.no_grad():
            layer.weight[self.target] = (steep * axis).to(layer.weight)
            layer.bias.zero_()
            layer.bias[self.target] = float(-steep * threshold)
        return model

    def guarantee(self, images: int, public: int | None = None) -> float:
        """Return the share of `images`, none of them of the target class, that pass alone."""
        return expected_share([1 / self.expected_images], images, public)


def _shape(model: nn.Module) -> tuple[int, int, int]:
    side = model.arguments["image_size"]
    return 3, side, side


@torch.no_grad()
def _features(model: nn.Module, knowledge: Knowledge) -> torch.Tensor:
    """Return what the classifier reads of the public pictures, (M, F)."""
    layer, seen = model.get_submodule(classifier_of(model, knowledge.image_shape)), []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().cpu()))
    try:
        for images in knowledge.public.split(256):
            model(images.to(next(model.parameters())))
    finally:
        handle.remove()
    return torch.cat(seen)
