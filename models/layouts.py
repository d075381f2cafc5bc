"""Layouts of transformers and ResNets: how a file's names tell whose they are, and what they are called here.

Names here are timm's. A layout is a pattern for each of its names; a name that no pattern knows is kept as it is, so
that a network with parts of another kind is refused by these names and never loaded without them.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.containers import flatten
from models.huggingface_weights import from_gpt2, from_huggingface
from models.official import from_official
from utils.errors import UserError

# HuggingFace's ViT, DeiT and DINOv2, with the names of their files and those of version 5 in memory.
HUGGINGFACE_VIT = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:attention\.)?(?:query|q_proj)\.", r"blocks.\1.attn.q."),
    (r"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:attention\.)?(?:key|k_proj)\.", r"blocks.\1.attn.k."),
    (r"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:attention\.)?(?:value|v_proj)\.", r"blocks.\1.attn.v."),
    (r"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (r"(?:encoder\.)?layers?\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.", "norm."),
    (r"(?:cls_)?classifier\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)
# Parts of HuggingFace's models that no classifier uses: masks of pre-training, the pooler of the bare model.
UNUSED = ("embeddings.mask_token", "pooler.")
# HuggingFace's image tower of CLIP.
CLIP = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"classifier\.", "head."),
)
CLIP_UNUSED = ("post_layernorm.", "embeddings.position_ids")  # what a classifier on it does not use
TORCHVISION_VIT = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
    (r"(?:heads\.head|head|heads|classifier|fc|linear)\.", "head."),
)
# The children of torchvision's ResNet in a Sequential, as in the official MJP code (whose name for it is `model`).
SEQUENTIAL_RESNET = (
    (r"0\.", "conv1."),
    (r"1\.", "bn1."),
    (r"4\.", "layer1."),
    (r"5\.", "layer2."),
    (r"6\.", "layer3."),
    (r"7\.", "layer4."),
    (r"(?:head|classifier|linear)\.", "fc."),
)

BERT = "embeddings.word_embeddings.weight"
RELATIVES = ("roberta", "distilbert", "albert", "electra", "deberta", "mpnet", "camembert")  # with the same mark


class Layout(NamedTuple):
    """name: whose it is, for messages; mark: a parameter every such network has and no other; rename: to names here."""

    name: str
    mark: str
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rename(weights: Mapping[str, Tensor], patterns: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Return the weights under the names the first fitting pattern gives them."""
    compiled = [(re.compile(pattern), new) for pattern, new in patterns]
    renamed = {}
    for name, value in weights.items():
        fitting = (pattern.sub(new, name, count=1) for pattern, new in compiled if pattern.match(name))
        renamed[next(fitting, name)] = value
    return renamed


def from_huggingface_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and join queries, keys and values into the one matrix timm has."""
    return join_qkv(rename({k: v for k, v in weights.items() if not k.startswith(UNUSED)}, HUGGINGFACE_VIT))


def join_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with queries, keys and values in the one matrix timm has."""
    joined = {}
    for name, value in weights.items():
        if ".attn.q." in name:
            parts = [weights[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            joined[name] = value
    return joined


def from_torchvision_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename(weights, TORCHVISION_VIT)


def from_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official MJP layout, and a classifier that lay beside the network under another name."""
    weights, dim = from_official(weights), len(weights["patch_embed.proj.weight"])
    for other in ("classifier", "fc", "linear"):
        matrix = weights.get(f"{other}.weight")
        if "head.weight" not in weights and matrix is not None and matrix.dim() == 2 and matrix.shape[1] == dim:
            weights = {re.sub(rf"^{other}\.", "head.", name): value for name, value in weights.items()}
    return weights


def from_sequential_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename(weights, SEQUENTIAL_RESNET)


def unchanged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights


LAYOUTS = (
    Layout("timm, DeiT, Swin and MJP", "patch_embed.proj.weight", from_timm),
    Layout("HuggingFace ViT, DeiT and DINOv2", "embeddings.patch_embeddings.projection.weight", from_huggingface_vit),
    Layout("torchvision ViT", "conv_proj.weight", from_torchvision_vit),
    Layout("HuggingFace BERT", BERT, from_huggingface),
    Layout("HuggingFace GPT-2", "wte.weight", from_gpt2),
    Layout("ResNet-50", "layer4.2.conv3.weight", unchanged),
    Layout("ResNet-50 in a Sequential", "7.2.conv3.weight", from_sequential_resnet),
)
MARKS = {layout.mark for layout in LAYOUTS}
VIT_MARKS = {layout.mark for layout in LAYOUTS if layout.rename in (from_huggingface_vit, from_torchvision_vit)}


def layout_of(weights: Mapping[str, Tensor], content: Mapping, path: str | Path) -> Layout | None:
    """Return the layout of weights whose prefix is gone, or None for one that is not known here.

    content: of the file, whose names may say that a model is only a relative of a known one. Raises UserError then.
    """
    layout = next((layout for layout in LAYOUTS if layout.mark in weights), None)
    if layout is not None and layout.mark == BERT:
        names = list(flatten(content, path))
        if relative := next((name for name in RELATIVES if any(name in key.split(".") for key in names)), None):
            raise UserError(f"checkpoint '{path}' is a model '{relative}', which is not known here: use a BERT")
    return layout
