"""Victims and classifiers. Every model maps (images (B, 3, H, W), mask) to logits (B, classes); text models take token
ids (B, n) for images and have a `vocab_size`.

Beyond `forward` each has `features(images, mask)` (what the classifier reads), `hides_positions` (it takes a mask),
`grid` and `patch_size` (the puzzle's cells), `arguments` (what `build_model` was called with), and from a checkpoint
`normalize` (mean and std of its inputs), `classes` (their names) and `tokenizer` (text, as JSON), else None, and `loss`
(cross_entropy, or bce of attributes).
To add a model: one builder in a file here, one line in MODELS, or in TEXT_MODELS.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from models.chains import TARGETS
from utils.errors import UserError, look_up, reason
from utils.registry import Later, Registry

if TYPE_CHECKING:
    from torch import nn


def _cifar_resnet(depth: int, times: int = 1, **options) -> Later:
    """Return a CIFAR ResNet of so many layers, `times` as wide as He et al. have it."""
    return Later("models.convnets:build_cifar_resnet", blocks=(depth - 2) // 6, width=16 * times, **options)


MODELS = Registry(
    vit="models.vit:build_vit",
    **{f"deit_{size}": Later("models.vit:build_vit", size) for size in ("tiny", "small", "base")},
    **{f"swin_{size}": Later("models.swin:build_swin", size) for size in ("tiny", "small", "base", "large")},
    resnet50="models.resnet:build_resnet50",
    resnet18="models.resnet:build_resnet18",
    lenet="models.convnets:build_lenet",
    convnet="models.convnets:build_convnet",
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    resnet20_nostride=_cifar_resnet(20, strides=(1, 1, 1)),
    resnet20_4=_cifar_resnet(20, 4),
    resnet20_4_unpooled=_cifar_resnet(20, 4, pool="max"),
    resnet20_10=_cifar_resnet(20, 10),
    resnet28_10=Later("models.convnets:build_cifar_resnet", blocks=4, width=160),
    resnet32_10=_cifar_resnet(32, 10),
    mlp="models.small_nets:build_mlp",
    mlp2=Later("models.small_nets:build_mlp", width=2048, hidden=1),
    densenet40="models.small_nets:build_densenet",
    densenet40_4=Later("models.small_nets:build_densenet", growth=48),
    irevnet="models.small_nets:build_irevnet",
    **{name: Later("models.convnets:build_target", name) for name in TARGETS},
)
LANGUAGE_MODELS = ("causal_small", "gpt2")  # predict the next token; no classifiers
TEXT_MODELS = Registry(
    {name: Later("models.text:build_text", name) for name in ("text_small", "bert")}
    | {name: Later("models.language:build_language", name) for name in LANGUAGE_MODELS}
)


def build_model(name: str, *, num_classes: int = 1000, seed: int = 0, **options) -> nn.Module:
    """Return a freshly initialised model on the CPU; the same seed gives the same weights. None options are not passed.

    bottleneck: width of PRECODE's variational bottleneck in front of the classifier (models/bottleneck.py), for any
    model; 0 is none. Raises UserError for an unknown name, an option the model does not have, or sizes that do not fit.
    """
    import torch

    from models.bottleneck import add_bottleneck

    builder = look_up(MODELS | TEXT_MODELS, name, "model")
    options = {key: value for key, value in options.items() if value is not None}
    for key, value in (("num_classes", num_classes), ("image_size", options.get("image_size", 1))):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"cannot build model '{name}': {key} must be a whole number of at least 1, got {value}")
    bottleneck = options.pop("bottleneck", 0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # refused below
        torch.default_generator.manual_seed(seed)
        try:
            model = builder(num_classes=num_classes, **options)
            if bottleneck:
                add_bottleneck(model, bottleneck)
                options["bottleneck"] = bottleneck
        except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"cannot build model '{name}': {_problem(error)}") from error
    for key, value in model.named_parameters():
        if not value.numel():
            shape = tuple(value.shape)
            raise UserError(f"cannot build model '{name}': its '{key}' has no values, shape {shape}: raise its sizes")
    model.normalize = model.classes = model.tokenizer = None  # known only to checkpoints
    model.loss = "cross_entropy"  # of classes; 'bce', the mean binary cross-entropy, of attributes
    if name in TEXT_MODELS:
        model.arguments = {"name": name, "num_classes": num_classes, **options}
        return model
    image_size, patch_size = options.get("image_size", getattr(model, "image_size", 224)), model.patch_size
    if image_size % patch_size or image_size < patch_size:
        fitting = max(image_size // patch_size, 1) * patch_size
        problem = f"image_size {image_size} is not divisible by patch_size {patch_size}"
        raise UserError(f"{problem}: choose {fitting} or another patch_size")
    model.arguments = {"name": name, "num_classes": num_classes, "image_size": image_size, **options}
    return model


def _problem(error: Exception) -> str:
    """Return why a model cannot be built, in the words of its options."""
    unknown = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
    if not unknown:
        return reason(error)
    if unknown[1] == "unknown":  # MJP's position embedding, which a mask ratio above 0 asks for
        return "it has no positions to hide, so MJP (unknown, mask_ratio) is not for it: take a ViT or ratio 0"
    return f"it has no option '{unknown[1]}'"
