"""Checkpoints: ours, the official MJP code's, timm's, DeiT's and HuggingFace BERT's, read without running their code.

Our file is a dict of tensors and plain values: {"format": "mjp", "arguments": what build_model takes, "model": weights,
"normalize": {"mean", "std"} or "tokenizer": JSON text, "classes": class names, ...training state}. Anything else is
recognised by its keys.
"""

import argparse
import collections
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from torch import Tensor, nn

from models import build_model
from models.archives import check_bytes, check_declared, check_description, check_size, odd_contents
from models.huggingface import bert_arguments, from_huggingface, is_huggingface
from models.official import from_official
from models.position import resize_pos_embed
from utils.errors import UserError, reason
from utils.files import write_atomic

FORMAT = "mjp"
FINE_TUNED = (
    "head.",
    "fc.",
    "unknown_pos_embed",
    "index_embed",
    "localization.",
    "pooler.",
)  # new when training starts from a file
# Official MJP files hold a yacs CfgNode and timm's an argparse Namespace; both are mapped to inert containers.
INERT_CLASSES = [(collections.OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write a checkpoint atomically: a reader finds the old file or the new one, never half of one."""
    write_atomic(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint file, on the CPU. Raises UserError when missing, truncated or not a checkpoint.

    The file may come from a stranger: nothing in it is run, and little more than its own size is allocated.
    """
    path = Path(path)
    if path.is_dir():  # as HuggingFace saves a model
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise UserError(
                f"checkpoint file '{path}' does not exist; a folder without model.safetensors or pytorch_model.bin"
            )
        path = files[0]
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        check_size(path)
        if path.suffix == ".safetensors":
            content = read_safetensors(path)
        else:
            with torch.serialization.safe_globals(INERT_CLASSES):
                content = torch.load(path, map_location="cpu", weights_only=True)
        check_declared(content, path)
        if isinstance(content, dict) and content.get("format") == FORMAT:  # others may have written no checksums
            check_bytes(path)
    except Exception as error:
        what = f"checkpoint '{path}' is truncated or not a checkpoint ({reason(error)})"
        raise UserError(f"{what}; use another file") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint '{path}' holds a {type(content).__name__}, not a dict of weights")
    return content


def read_safetensors(path: Path) -> dict:
    """The weights of a safetensors file, or all of our checkpoint where its header carries the rest of it."""
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        described = (file.metadata() or {}).get(FORMAT)
    return {**json.loads(described), "format": FORMAT, "model": weights} if described else weights


def save_safetensors(path: str | Path, model: nn.Module) -> None:
    """Write a model's weights as safetensors, atomically, with its arguments, normalize and classes as JSON in the
    header: `load_model` reads it like a checkpoint, any other reader as plain weights."""
    described = {key: getattr(model, key) for key in ("arguments", "normalize", "classes")}
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    header = {"format": "pt", FORMAT: json.dumps(described)}
    write_atomic(path, lambda file: file.write(save(weights, header)))


def load_model(path: str | Path, *, ema: bool = False, **overrides) -> nn.Module:
    """Rebuild the model a checkpoint was saved from and load its weights (evaluation mode, on the CPU).

    overrides: build_model arguments that differ, e.g. `image_size` (the PE grid is then resized) or, for files of other
    projects, `name` and `num_heads`. ema: the averaged weights of our own checkpoints. The model carries `normalize`
    and `classes` when the file knows them. Raises UserError naming the keys that do not fit.
    """
    content = read_checkpoint(path)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    weights = weights_of(content, path, ema=ema)
    if not weights or not all(value.numel() for value in weights.values()):
        raise UserError(f"checkpoint '{path}' has no weights, or empty ones; use another file")
    if content.get("format") == FORMAT:
        check_description(content, weights, path)
        arguments = content["arguments"]
    else:
        with odd_contents(path):
            arguments = infer_arguments(weights, path)
    arguments = {**arguments, **overrides}
    with odd_contents(path):
        with torch.device("meta"):  # sizes are compared before memory is given to them
            fit_weights(build_model(**arguments), weights, path)
        model = build_model(**arguments)
        load_weights(model, weights, path)
    model.normalize, model.classes = content.get("normalize"), content.get("classes")
    model.tokenizer = content.get("tokenizer")
    return model.eval()


def weights_of(content: dict, path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The model's weights in a checkpoint of any known layout, under our names."""
    if content.get("format") != FORMAT:
        if ema:
            raise UserError(f"checkpoint '{path}' was not written by train.py: only those keep averaged weights apart")
        weights = plain_weights(content, path)
        return from_huggingface(weights) if is_huggingface(weights) else from_official(weights)
    weights = content.get("model_ema" if ema else "model")
    if weights is None:
        raise UserError(f"checkpoint '{path}' holds no averaged weights: it was trained without --optim.ema")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint '{path}' has a 'model' that is not a dict of tensors; use another file")
    return weights


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, may_stay_new: Sequence[str] = ()
) -> list[str]:
    """Load by name and shape, resizing the PE table to the model's grid. Every key must fit.

    may_stay_new: prefixes of parameters that keep their fresh initialisation where the file lacks them or has another
    shape, as in fine-tuning; returns their names. Raises UserError naming the keys that do not fit.
    """
    weights, new = fit_weights(model, weights, path, may_stay_new)
    model.load_state_dict(weights)
    return new


def fit_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, may_stay_new: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights as `load_weights` gives them to the model, and the names of those that stay new."""
    weights = dict(weights)
    if "patch_embed.proj.weight" in weights and "layers.0.blocks.0.attn.qkv.weight" in weights:
        weights = filter_swin(weights, model)
    prefix = getattr(model, "num_prefix_tokens", 0)
    for key in ("pos_embed", "index_embed"):
        target = getattr(model, key, None)
        if key not in weights or target is None or weights[key].shape == target.shape or weights[key].dim() != 3:
            continue
        number = weights[key].shape[1] - prefix
        if len(model.grid) == 1:
            weights[key] = weights[key][:, : target.shape[1]]  # of more places than the model has, the first ones
        elif number > 0 and round(number**0.5) ** 2 == number:  # anything else is reported below as a different shape
            weights[key] = resize_pos_embed(weights[key], model.grid, None, prefix)
    own, new = model.state_dict(), []
    for key, value in own.items():
        if key.startswith(tuple(may_stay_new)) and (key not in weights or weights[key].shape != value.shape):
            weights[key] = value
            new.append(key)
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "different shape": [key for key in own if key in weights and own[key].shape != weights[key].shape],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        raise UserError(f"checkpoint '{path}' does not fit model '{model.arguments['name']}' ({listed})")
    return weights, new


def plain_weights(content: dict, path: str | Path) -> dict[str, Tensor]:
    for key in ("model", "state_dict", "model_state"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {
        key.removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor) and isinstance(key, str)
    }
    if not weights:
        raise UserError(f"checkpoint '{path}' holds no weights (keys: {', '.join(map(str, list(content)[:5]))})")
    return weights


def infer_arguments(weights: dict[str, Tensor], path: str | Path) -> dict:
    """build_model arguments read off a state dict of timm, DeiT, torchvision or the official MJP code."""
    if "fc.weight" in weights and "layer4.2.conv3.weight" in weights:
        return {"name": "resnet50", "num_classes": len(weights["fc.weight"])}
    head = next((weights[key] for key in ("head.weight", "head.fc.weight") if key in weights), None)
    if "token_embed.weight" in weights:
        if head is None:
            raise UserError(f"checkpoint '{path}' is a BERT without a classifier: start train.py from it with --init")
        return bert_arguments(weights)
    if "patch_embed.proj.weight" not in weights or head is None:
        raise UserError(
            f"checkpoint '{path}' is not a ViT, Swin or ResNet-50 with a classifier (first key: {next(iter(weights))})"
        )
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    arguments = {"num_classes": len(head), "patch_size": patch_size}
    if "layers.0.blocks.0.attn.qkv.weight" in weights:
        depth = len({key.split(".")[3] for key in weights if key.startswith("layers.2.blocks.")})
        names = {(96, 6): "swin_tiny", (96, 18): "swin_small", (128, 18): "swin_base", (192, 18): "swin_large"}
        if (dim, depth) not in names:
            raise UserError(
                f"checkpoint '{path}' is a Swin of width {dim} and stage-3 depth {depth}, which is not known here"
            )
        biases = weights.get("layers.0.blocks.0.attn.relative_position_bias_table")
        if biases is None:
            raise UserError(f"checkpoint '{path}' is a Swin without bias tables (version 2?), which is not known here")
        window = (round(len(biases) ** 0.5) + 1) // 2  # the table has (2 window - 1)^2 rows
        absolute = "pos_embed" in weights
        return {"name": names[dim, depth], "window_size": window, "absolute_pos_embed": absolute, **arguments}
    if "pos_embed" not in weights:
        raise UserError(f"checkpoint '{path}' is a ViT without position embeddings, which is not known here")
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "name": "vit",
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        "num_heads": max(1, dim // 64),  # every published ViT and DeiT has 64 dimensions per head
        "image_size": side * patch_size,
        "unknown": "unknown_pos_embed" in weights,
        "index_embed": "index_embed" in weights,
        "localization": "nonlinear"
        if "localization.layers.2.weight" in weights
        else ("linear" if "localization.layers.weight" in weights else "none"),
        **arguments,
    }
