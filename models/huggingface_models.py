"""Models as HuggingFace saves them, hf:FOLDER or hf:NAME of its hub: ViT, DINOv2, DeiT, CLIP's image tower, BERT and
GPT-2.

ViT, DINOv2, BERT and GPT-2 become the networks of models/checkpoints.py, all of which but the last can have MJP's
unknown row. DeiT, with its second token, and CLIP, with a LayerNorm before the first block, become networks of timm.
What a folder says in config.json and preprocessor_config.json (heads, norms, normalisation, classes) is used.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.layers import get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.archives import check_numbers
from models.checkpoints import load_model, read_checkpoint
from models.containers import plain_weights
from models.descriptions import assume_classifier, read_description
from models.inference import NEW_HEAD, ratio_of
from models.layouts import CLIP, CLIP_UNUSED, from_huggingface_vit, join_qkv, rename
from models.position import resize_pos_embed
from utils.errors import UserError, kind_and_reason
from utils.notes import Notes

PREFIX = "hf:"
OWN = ("vit", "dinov2", "bert", "gpt2")  # kinds that models/checkpoints.py reads
CLIPS = ("clip", "clip_vision_model")
FILES = ("*.json", "vocab.txt", "model.safetensors", "pytorch_model.bin")
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
DEFAULTS = {  # of transformers: the part of a config.json on CLIP's tower may list only what differs from them
    "deit": SIZES | {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "clip": SIZES | {"image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
}
HEADS = {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
OTHER = "'{}' holds another network than its config.json says: look at '{}'"
HEAD = f"save a ...ForImageClassification, or {NEW_HEAD}"


def is_huggingface(name: str | None) -> bool:
    """Return whether a model is named as one of HuggingFace."""
    return name is not None and str(name).startswith(PREFIX)


def open_huggingface(
    spec: str,
    *,
    checkpoint: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
    ema: bool = False,
    num_classes: int | None = None,
    **options,
) -> nn.Module:
    """Return the model of hf:FOLDER or hf:NAME in evaluation mode on the CPU.

    image_size: side of its input where it differs from the folder's; the position table is resized. num_classes: a new
    classifier, drawn after `torch.manual_seed(seed)`, where the folder has none of this size. options: of `load_model`,
    for kinds that it reads. Raises UserError for another kind, no classifier, a name no hub gives.
    """
    if checkpoint:
        raise UserError(f"--model {spec} has its weights with it: leave out --checkpoint")
    folder = find_folder(spec.removeprefix(PREFIX))
    config = _read_config(folder)
    kind = config.get("model_type")
    if kind in OWN:
        own = {"image_size": image_size, "num_classes": num_classes, "ema": ema}
        return load_model(folder, **own, **options)
    if kind not in ("deit", *CLIPS):
        raise UserError(f"'{folder}' holds a model of kind '{kind}': known are {', '.join((*OWN, 'deit', 'clip'))}")
    if options:
        raise UserError(f"model_options.{next(iter(options))} is not an option of a '{kind}' of HuggingFace")
    content, notes = read_checkpoint(folder), Notes()
    said = read_description(content, folder)
    assume_classifier(said, notes)
    renamed = _clip(content, folder, config) if kind in CLIPS else _deit(content, folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _fill(renamed, config, folder, kind, image_size, num_classes, notes)
    network.normalize, network.normalize_from = said.normalize, said.normalize_from
    known = said.classes is not None and len(said.classes) == network.num_classes
    network.classes = said.classes if known and "new" not in notes.assumed else None
    network.assumed, network.loss = notes.assumed, said.loss
    return network.eval()


def find_folder(name: str) -> Path:
    """Return a local folder, or the one a name of the hub is downloaded to. Raises UserError where neither is there."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith(("/", ".", "~")):  # no name of a hub looks like these
        what = "is a file" if Path(name).exists() else "does not exist"
        raise UserError(f"hf:{name} {what}: pass hf:FOLDER, a folder that save_pretrained() wrote")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # what a download can raise depends on the client
        raise UserError(
            f"hf:{name} is no folder here, and the hub did not give it ({kind_and_reason(error)}): where there is no "
            "network, copy its config.json and model.safetensors into a folder and pass hf:FOLDER"
        ) from error


def _read_config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"'{folder}' has no config.json of HuggingFace: save it with save_pretrained()")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"'{file}' is no JSON object: get it again, or save the model with save_pretrained()")
    return config


def _clip(content: dict, folder: Path, config: dict) -> dict[str, Tensor]:
    """Return weights of CLIP's image tower under timm's names, without what its classifier does not use."""
    weights = plain_weights(content, folder, {"embeddings.class_embedding", "pre_layrnorm.weight"})
    weights = {key: value for key, value in weights.items() if not key.startswith(CLIP_UNUSED)}
    weights = join_qkv(rename(weights, CLIP))
    weights["cls_token"], weights["pos_embed"] = weights["cls_token"][None, None], weights["pos_embed"][None]
    return weights


def _deit(content: dict, folder: Path) -> dict[str, Tensor]:
    """Return weights of DeiT under timm's names. Without a second classifier its second token is a register."""
    mark = {"embeddings.patch_embeddings.projection.weight", "embeddings.distillation_token"}
    weights = from_huggingface_vit(plain_weights(content, folder, mark))
    if "head_dist.weight" not in weights and "dist_token" in weights:
        weights["reg_token"] = weights.pop("dist_token")
    return weights


def _sizes(tower: object, kind: str, folder: Path) -> dict:
    """Return what config.json says of the network, with the defaults of transformers. Raises UserError naming what
    cannot be."""
    if not isinstance(tower, dict):
        raise UserError(f"'{folder / 'config.json'}' has a vision_config that is no JSON object: get it again")
    tower = DEFAULTS[kind] | tower
    for key in (*SIZES, "image_size", "patch_size"):
        value = tower.get(key)
        if isinstance(value, list) and len({*value}) == 1:
            value = value[0]
        if type(value) is not int or value < 1:
            square = " of equal sides" if isinstance(value, list) else ""
            raise UserError(f"'{folder / 'config.json'}' has {key} {value!r}: a number above 0{square} is needed")
        tower[key] = value
    eps, heads = tower["layer_norm_eps"], tower["num_attention_heads"]
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise UserError(f"'{folder / 'config.json'}' has layer_norm_eps {eps!r}: a number from 0 to 1 is needed")
    if tower["hidden_size"] % heads:
        raise UserError(f"'{folder / 'config.json'}' has {heads} attention heads, which do not divide hidden_size")
    try:
        tower["act_layer"] = get_act_layer(str(tower["hidden_act"]))
    except KeyError as error:
        raise UserError(f"'{folder}' is a network with {tower['hidden_act']!r}, not known here: use another") from error
    return tower


def _fill(
    weights: dict[str, Tensor],
    config: dict,
    folder: Path,
    kind: str,
    image_size: int | None,
    num_classes: int | None,
    notes: Notes,
) -> nn.Module:
    """Return the network of timm that the weights are of, with them in it."""
    tower = _sizes(config.get("vision_config", config), "clip" if kind in CLIPS else kind, folder)
    found = len(weights["head.weight"]) if "head.weight" in weights else None
    if found is None and num_classes is None:
        raise UserError(f"'{folder}' holds a model without a classifier: {HEAD}")
    side = image_size or tower["image_size"]
    build = _builder(weights, tower, kind, side, num_classes or found, folder)
    _check_shapes(weights, build, folder)
    network = build()
    if weights["pos_embed"].shape != network.pos_embed.shape:
        grid = network.patch_embed.grid_size
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], grid, None, network.num_prefix_tokens)
        notes.assume("image_size", f"the model was made for other images and is used at {side} pixels")
    own = network.state_dict()
    if found != network.num_classes:
        new = {key: value for key, value in own.items() if key in HEADS}
        weights |= new
        notes.assume("new", f"drawn anew, as asked for and not in the file: {', '.join(new)}")
    if odd := [name for name in HEADS & own.keys() if name not in weights or weights[name].shape != own[name].shape]:
        raise UserError(OTHER.format(folder, sorted(odd)[0]))
    check_numbers(weights, own, folder)
    network.load_state_dict(weights)
    return network


def _builder(
    weights: dict[str, Tensor], tower: dict, kind: str, side: int, num_classes: int, folder: Path
) -> Callable[[], VisionTransformer]:
    """Return what builds the network of timm for images of `side` pixels. Raises UserError where its patches do not
    divide them, and where the weights are of another number of blocks."""
    patch, depth, distilled = tower["patch_size"], tower["num_hidden_layers"], "head_dist.weight" in weights
    if side % patch:
        raise UserError(f"image_size {side} is not divisible by the patches of {patch} pixels of '{folder}'")
    if len({name.split(".")[1] for name in weights if name.startswith("blocks.")}) != depth:
        raise UserError(OTHER.format(folder, "num_hidden_layers"))
    shape = {
        "img_size": side, "patch_size": patch, "embed_dim": tower["hidden_size"], "depth": depth,
        "num_heads": tower["num_attention_heads"], "num_classes": num_classes,
        "mlp_ratio": ratio_of(tower["intermediate_size"], tower["hidden_size"]),
        "norm_layer": partial(nn.LayerNorm, eps=tower["layer_norm_eps"]),
        "act_layer": tower["act_layer"], "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }  # fmt: skip
    if kind in CLIPS:
        shape |= {"pre_norm": True, "global_pool": "avg", "final_norm": False, "fc_norm": False}
    elif not distilled:
        shape |= {"reg_tokens": 1}
    return partial(VisionTransformerDistilled if distilled else VisionTransformer, **shape)


def _check_shapes(weights: dict[str, Tensor], build: Callable[[], VisionTransformer], folder: Path) -> None:
    """Raise UserError unless the weights have the names and shapes of the network, but for its classifiers and the size
    of its position table. Shapes are compared before memory is given to them."""
    with torch.device("meta"):
        own, prefix = (network := build()).state_dict(), network.num_prefix_tokens
    odd = sorted((weights.keys() ^ own.keys()) - HEADS)
    odd += [name for name in own if name not in HEADS | {"pos_embed"} and weights[name].shape != own[name].shape]
    rows = weights["pos_embed"].shape[1] - prefix
    if odd or weights["pos_embed"].shape[2:] != own["pos_embed"].shape[2:] or math.isqrt(rows) ** 2 != rows:
        raise UserError(OTHER.format(folder, odd[0] if odd else "pos_embed"))
