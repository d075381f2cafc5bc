"""ViTs of Google's JAX code, in NumPy archives (.npz): timm reads them, here their shape is found for it."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.file_kinds import TIMM
from models.inference import ratio_of
from utils.errors import UserError

PREFIXES = ("", "opt/target/", "params/", "params/img/")  # of vision_transformer and of big_vision
KERNEL = "embedding/kernel"
# Parts of such networks that a class-token ViT does not have, by a name in the archive.
FOREIGN = {
    "conv_root/kernel": "a hybrid of a ResNet and a ViT",
    "MAPHead_0/probe": "a ViT with attention pooling",
    "pre_logits/kernel": "a ViT with a layer between the class token and the classifier",
}


def is_jax_vit(path: Path) -> bool:
    """Return whether a file is a NumPy archive with the patch embedding of a ViT."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    return any(f"{prefix}{KERNEL}.npy" in names for prefix in PREFIXES)


def read_jax_vit(path: Path) -> dict:
    """Return the weights of a JAX ViT under timm's names ("model"), and its number of heads ("config").

    Raises UserError for a network that is not a class-token ViT, ValueError for arrays that do not fit together.
    """
    with np.load(path, allow_pickle=False) as arrays:
        prefix = next(prefix for prefix in PREFIXES if f"{prefix}{KERNEL}" in arrays)
        names = {name.removeprefix(prefix) for name in arrays.files}
        foreign = next((what for name, what in FOREIGN.items() if name in names), None)
        if foreign is None and "cls" not in names:
            foreign = "a ViT without a class token"
        if foreign:
            raise UserError(f"checkpoint '{path}' is {foreign}, which is not known here: {TIMM}")
        shape, heads = _shape({name: arrays[prefix + name] for name in names if _tells_shape(name)}, names)
    network = VisionTransformer(**shape)
    network.load_pretrained(str(path))
    weights: dict[str, Tensor] = network.state_dict()
    return {"model": weights, "config": {"num_attention_heads": heads}}


def _tells_shape(name: str) -> bool:
    return name == KERNEL or name.endswith(("pos_embedding", "query/kernel", "Dense_0/kernel", "head/kernel"))


def _shape(arrays: Mapping[str, np.ndarray], names: set[str]) -> tuple[dict, int]:
    """Return timm's arguments of the network, and its number of heads."""
    patch, dim = arrays[KERNEL].shape[0], arrays[KERNEL].shape[-1]
    rows = next(value for name, value in arrays.items() if name.endswith("pos_embedding")).shape[-2]
    queries = next(value for name, value in arrays.items() if name.endswith("query/kernel"))
    hidden = next(value for name, value in arrays.items() if name.endswith("Dense_0/kernel"))
    stacked = "Transformer/encoderblock/LayerNorm_0/scale" in names  # all blocks in one array
    blocks = {name.split("/")[1] for name in names if name.startswith("Transformer/encoderblock_")}
    side = round((rows - 1) ** 0.5)
    if side * side + 1 != rows:
        raise ValueError(f"its table of {rows} positions is no square and a class token")
    shape = {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len(queries) if stacked else len(blocks),
        "num_heads": queries.shape[-2],
        "mlp_ratio": ratio_of(hidden.shape[-1], dim),
        "num_classes": arrays["head/kernel"].shape[-1] if "head/kernel" in arrays else 0,
    }
    return shape, queries.shape[-2]
