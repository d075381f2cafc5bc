"""Victims and classifiers. Every model maps (images (B, 3, H, W), mask) to logits (B, classes); text models take token
ids (B, n) for images and have a `vocab_size`.

Beyond `forward` each has `features(images, mask)` (what the classifier reads), `hides_positions` (it takes a mask),
`grid` and `patch_size` (the puzzle's cells), `arguments` (what `build_model` was called with), and from a checkpoint
`normalize` (mean and std of its inputs), `classes` (their names) and `tokenizer` (text, as JSON), else None, and `loss`
(cross_entropy, or bce of attributes).
To add a model: one builder in a file here, one line in MODELS, or in TEXT_MODELS.
"""

from functools import partial

import torch
from torch import nn

import models.timm_names  # noqa: F401, registers its names with timm
from models.bottleneck import add_bottleneck
from models.convnets import TARGETS, build_convnet, build_lenet, build_target
from models.resnet import build_resnet18, build_resnet50
from models.small_nets import SMALL_NETS
from models.swin import build_swin
from models.text import SHAPES, build_text
from models.vit import build_vit
from utils.errors import UserError, look_up, reason

MODELS = {
    "vit": build_vit,
    "deit_tiny": partial(build_vit, "tiny"),
    "deit_small": partial(build_vit, "small"),
    "deit_base": partial(build_vit, "base"),
    "swin_tiny": partial(build_swin, "tiny"),
    "swin_small": partial(build_swin, "small"),
    "swin_base": partial(build_swin, "base"),
    "swin_large": partial(build_swin, "large"),
    "resnet50": build_resnet50,
    "resnet18": build_resnet18,
    "lenet": build_lenet,
    "convnet": build_convnet,
    **SMALL_NETS,
    **{name: partial(build_target, name) for name in TARGETS},
}
TEXT_MODELS = {name: partial(build_text, name) for name in SHAPES}


def build_model(name: str, *, num_classes: int = 1000, seed: int = 0, **options) -> nn.Module:
    """A freshly initialised model on the CPU; the same seed gives the same weights. None options are not passed.

    bottleneck: width of PRECODE's variational bottleneck in front of the classifier (models/bottleneck.py), for any
    model; 0 is none. Raises UserError for an unknown name, an option the model does not have, or sizes that do not fit.
    """
    builder = look_up(MODELS | TEXT_MODELS, name, "model")
    options = {key: value for key, value in options.items() if value is not None}
    bottleneck = options.pop("bottleneck", 0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = builder(num_classes=num_classes, **options)
            if bottleneck:
                add_bottleneck(model, bottleneck)
                options["bottleneck"] = bottleneck
        except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"cannot build model '{name}': {reason(error)}") from error
    model.normalize = model.classes = model.tokenizer = None  # known only to checkpoints
    model.loss = "cross_entropy"  # of classes; 'bce', the mean binary cross-entropy, of attributes
    if name in SHAPES:
        model.arguments = {"name": name, "num_classes": num_classes, **options}
        return model
    image_size, patch_size = options.get("image_size", getattr(model, "image_size", 224)), model.patch_size
    if image_size % patch_size or image_size < patch_size:
        fitting = max(image_size // patch_size, 1) * patch_size
        problem = f"image_size {image_size} is not divisible by patch_size {patch_size}"
        raise UserError(f"{problem}: choose {fitting} or another patch_size")
    model.arguments = {"name": name, "num_classes": num_classes, "image_size": image_size, **options}
    return model
