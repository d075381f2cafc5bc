"""MJP vision transformers under names of timm, which `import models.timm_names` registers: then call
`timm.create_model('mjp_deit_small_patch16_224')`.

They are models/vit.py behind timm's factory: create_model resizes them, sets their classes, and reads their weights
from a file or an exported folder (`local-dir:FOLDER`, scripts/export.py) in our layout or the official one.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from models.official import from_official
from models.vit import SIZES, VisionTransformer

# Inputs as DeiT and the official MJP code evaluate them.
INPUTS = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
NAMES = {size: f"mjp_deit_{size}_patch16_224" for size in SIZES}
default_cfgs = generate_default_cfgs({name: INPUTS for name in NAMES.values()})


def filter_weights(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights of any layout models/checkpoints.py knows, under our names, PE table resized to the model's
    grid."""
    return checkpoint_filter_fn(from_official(weights.get("model", weights)), model)


def _build(size: str, pretrained: bool = False, **options) -> VisionTransformer:
    options = SIZES[size] | {"patch_size": 16, "unknown": True} | options
    return build_model_with_cfg(
        VisionTransformer, NAMES[size], pretrained, pretrained_filter_fn=filter_weights, **options
    )


@register_model
def mjp_deit_tiny_patch16_224(pretrained: bool = False, **options) -> VisionTransformer:
    """Return DeiT-Ti/16 whose forward(images, mask) hides the positions of masked patches (Ren et al., CVPR 2023)."""
    return _build("tiny", pretrained, **options)


@register_model
def mjp_deit_small_patch16_224(pretrained: bool = False, **options) -> VisionTransformer:
    """Return DeiT-S/16 whose forward(images, mask) hides the positions of masked patches (Ren et al., CVPR 2023)."""
    return _build("small", pretrained, **options)


@register_model
def mjp_deit_base_patch16_224(pretrained: bool = False, **options) -> VisionTransformer:
    """Return DeiT-B/16 whose forward(images, mask) hides the positions of masked patches (Ren et al., CVPR 2023)."""
    return _build("base", pretrained, **options)
