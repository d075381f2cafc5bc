"""From weights under timm's names to the arguments `build_model` needs: sizes are read off shapes."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.descriptions import Said, find_heads
from models.file_kinds import TIMM
from utils.errors import UserError
from utils.notes import Notes

SWINS = {(96, 6): "swin_tiny", (96, 18): "swin_small", (128, 18): "swin_base", (192, 18): "swin_large"}

NEW_HEAD = "give attack.py or audit.py a new one, --model_options.num_classes N"
WITHOUT_HEAD = f"start train.py from it with --init, or {NEW_HEAD}"


def infer_arguments(
    weights: Mapping[str, Tensor],
    path: str | Path,
    said: Said,
    notes: Notes,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> dict:
    """Return build_model arguments of weights of timm, DeiT, torchvision, HuggingFace or the official MJP code.

    said: what the file says beside its weights. num_heads: where the user says it. num_classes: of a classifier that
    the user asks for, without which weights that have none are refused. The notes get what is assumed.
    Raises UserError for networks that are not known here, naming what else could open them.
    """
    if "fc.weight" in weights and "layer4.2.conv3.weight" in weights:
        return {"name": "resnet50", "num_classes": len(weights["fc.weight"])} | _grey(weights["conv1.weight"])
    head = next((weights[key] for key in ("head.weight", "head.fc.weight") if key in weights), None)
    if "token_embed.weight" in weights and "norm.weight" in weights:
        return _gpt2(weights, path, said, num_heads)
    if "token_embed.weight" in weights:
        if head is None and num_classes is not None:
            head = torch.empty(num_classes, weights["token_embed.weight"].shape[1], device="meta")
        return _bert(weights, head, path, said, notes, num_heads)
    if "patch_embed.proj.weight" not in weights:
        known, first = said.timm_name, next(iter(weights))
        remedy = f"pass --timm {known}, or --model timm:{known} to attack.py" if known else TIMM
        raise UserError(f"checkpoint '{path}' is not a ViT, Swin or ResNet-50 of a known kind (key {first}): {remedy}")
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    if head is None and num_classes is None:
        raise UserError(f"checkpoint '{path}' is not a ViT, Swin or ResNet-50 with a classifier: {WITHOUT_HEAD}")
    head = torch.empty(num_classes, dim, device="meta") if head is None else head
    sizes = {"num_classes": len(head), "patch_size": patch_size} | _grey(weights["patch_embed.proj.weight"])
    if "layers.0.blocks.0.attn.qkv.weight" in weights:
        return _swin(weights, dim, patch_size, path, notes) | sizes
    return _vit(weights, head, path, said, notes, num_heads) | sizes


def ratio_of(hidden: int, dim: int) -> float:
    """Return the mlp_ratio from which int(dim * mlp_ratio) is `hidden`, which hidden / dim may fall short of."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _grey(kernel: Tensor) -> dict:
    """Return the option of a first layer (D, C, P, P) that reads one channel."""
    return {"in_chans": 1} if kernel.dim() == 4 and kernel.shape[1] == 1 else {}


def _vit(weights, head: Tensor, path: str | Path, said: Said, notes: Notes, num_heads: int | None) -> dict:
    if "pos_embed" not in weights:
        raise UserError(f"checkpoint '{path}' is a ViT without position embeddings, which is not known here: {TIMM}")
    for part, what in (("dist_token", "a distillation token"), ("reg_token", "register tokens")):
        if part in weights:
            raise UserError(f"checkpoint '{path}' is a ViT with {what}, which is not known here: {TIMM}")
    if isinstance(shape := said.config.get("image_size"), (list, tuple)) and len({*shape}) > 1:
        raise UserError(f"checkpoint '{path}' is of images of {' x '.join(map(str, shape))} pixels: only squares work")
    first, second = (weights.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    gated = None not in (first, second) and len(first) > second[0].numel()
    if gated or any(".mlp.weights_in." in key or ".mlp.w12." in key for key in weights):  # HuggingFace's, and Meta's
        raise UserError(f"checkpoint '{path}' is a ViT with a gated MLP (SwiGLU), which is not known here: {TIMM}")
    if said.config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"checkpoint '{path}' is a ViT with '{said.config['hidden_act']}', not known here: use another")
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if not depth:
        last = list(weights)[-1]
        raise UserError(f"checkpoint '{path}' has the patches of a ViT and no blocks known here (but '{last}'): {TIMM}")
    if num_heads is None:
        num_heads, assumed = find_heads(said, dim, depth, "vit", path)
        if assumed:
            notes.assume("num_heads", assumed)
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    arguments = {
        "name": "vit",
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "image_size": side * patch_size,
        **_puzzle_parts(weights),
    }
    # What differs from timm's default: of these the weights, or the configuration beside them, tell.
    if "blocks.0.mlp.fc1.weight" in weights and len(weights["blocks.0.mlp.fc1.weight"]) != 4 * dim:
        arguments["mlp_ratio"] = ratio_of(len(weights["blocks.0.mlp.fc1.weight"]), dim)
    if "blocks.0.ls1.gamma" in weights:
        arguments["init_values"] = 1e-5
    if "blocks.0.attn.qkv.bias" not in weights:
        arguments["qkv_bias"] = False
    if head.shape[1] == 2 * dim:
        arguments["pool_patches"] = True
    if (eps := said.config.get("layer_norm_eps")) not in (None, 1e-6):
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1:
            raise UserError(f"checkpoint '{path}' has a config.json with layer_norm_eps {eps!r}: get it again")
        arguments["norm_eps"] = float(eps)
    return arguments


def _puzzle_parts(weights: Mapping[str, Tensor]) -> dict:
    """Return which parts of MJP the weights have: options of `build_model`."""
    kinds = {"localization.layers.2.weight": "nonlinear", "localization.layers.weight": "linear"}
    return {
        "unknown": "unknown_pos_embed" in weights,
        "index_embed": "index_embed" in weights,
        "localization": next((kind for key, kind in kinds.items() if key in weights), "none"),
    }


def _swin(weights: Mapping[str, Tensor], dim: int, patch_size: int, path: str | Path, notes: Notes) -> dict:
    depth = len({key.split(".")[3] for key in weights if key.startswith("layers.2.blocks.")})
    if (dim, depth) not in SWINS:
        raise UserError(
            f"checkpoint '{path}' is a Swin of width {dim} and stage-3 depth {depth}, which is not known here: {TIMM}"
        )
    if "layers.0.blocks.0.attn.logit_scale" in weights:
        raise UserError(f"checkpoint '{path}' is a Swin of version 2, which is not known here: {TIMM}")
    biases = weights.get("layers.0.blocks.0.attn.relative_position_bias_table")
    shifted = weights.get("layers.0.blocks.1.attn_mask")  # (windows, window^2, window^2)
    if biases is not None:
        window = (round(len(biases) ** 0.5) + 1) // 2  # the table has (2 window - 1)^2 rows
    elif shifted is not None and shifted.dim() == 3:
        window = round(shifted.shape[1] ** 0.5)
    else:
        window = 7
        notes.assume("window_size", "windows of 7 x 7 patches, as published: the weights do not say")
    arguments = {"name": SWINS[dim, depth], "window_size": window, "absolute_pos_embed": "pos_embed" in weights}
    arguments |= {key: value for key, value in _puzzle_parts(weights).items() if value not in (False, "none")}
    if biases is None:
        arguments["relative_position_bias"] = False
    table = weights.get("pos_embed", weights.get("index_embed"))
    if table is not None and table.dim() == 3:
        arguments["image_size"] = round(table.shape[1] ** 0.5) * patch_size
    elif shifted is not None and shifted.dim() == 3:
        arguments["image_size"] = round(len(shifted) ** 0.5) * window * patch_size
    return arguments


# What a BERT may say of itself beside its sizes, in the words of HuggingFace, and what its classifier may not be of.
BERT = {
    "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": False,
    "position_embedding_type": "absolute",
}  # fmt: skip
OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")


def _bert(weights, head: Tensor | None, path: str | Path, said: Said, notes: Notes, num_heads: int | None) -> dict:
    if head is None:
        raise UserError(f"checkpoint '{path}' is a BERT without a classifier: {WITHOUT_HEAD}")
    for kind in said.config.get("architectures") or ():
        if str(kind).endswith(OTHER_HEADS):
            raise UserError(f"checkpoint '{path}' is a '{kind}', not known here: save a BertForSequenceClassification")
    for key, known in BERT.items():
        if (value := said.config.get(key)) not in (None, known):
            raise UserError(f"checkpoint '{path}' is a BERT with {key} {value}, not known here: only {known} is")
    sizes = _text_sizes(weights)
    if num_heads is None:
        num_heads, assumed = find_heads(said, sizes["embed_dim"], sizes["depth"], "bert", path)
        if assumed:
            notes.assume("num_heads", assumed)
    return {"name": "bert", "num_heads": num_heads, "num_classes": len(head)} | sizes


def _text_sizes(weights) -> dict:
    """Return the arguments of a text model that the shapes of its weights tell."""
    vocab_size, dim = weights["token_embed.weight"].shape
    return {
        "vocab_size": vocab_size,
        "max_length": weights["pos_embed"].shape[1],
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        "mlp_ratio": ratio_of(len(weights["blocks.0.mlp.fc1.weight"]), dim),
    }


# What a GPT-2 may say of itself beside its sizes, in the words of HuggingFace.
GPT2 = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip


def _gpt2(weights, path: str | Path, said: Said, num_heads: int | None) -> dict:
    """Return the arguments of a GPT-2. Raises UserError for one that classifies, and for its variants."""
    for kind in said.config.get("architectures") or ():
        if kind not in ("GPT2LMHeadModel", "GPT2Model"):
            raise UserError(f"checkpoint '{path}' is a '{kind}', which is not known here: save a GPT2LMHeadModel")
    for key, known in GPT2.items():
        if (value := said.config.get(key, known)) != known:
            raise UserError(f"checkpoint '{path}' is a GPT-2 with {key} {value}, not known here: only {known} is")
    sizes = _text_sizes(weights)
    if num_heads is None:
        num_heads, _ = find_heads(said, sizes["embed_dim"], sizes["depth"], "gpt2", path)
    tied = torch.equal(weights["head.weight"], weights["token_embed.weight"])
    return {"name": "gpt2", "num_heads": num_heads, "tied": tied, "num_classes": sizes["vocab_size"]} | sizes
