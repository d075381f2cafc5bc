"""Clients that train and share a part of the network: everything else is frozen (requires_grad False)."""

import copy
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

from models.adapters import add_adapters
from models.lora import TARGETS, add_lora
from utils.errors import UserError

PARTS = {
    "all": "every parameter",
    "head": "the classifier alone (linear probing)",
    "lora": "LoRA's two thin matrices",
    "adapters": "the adapters behind the blocks",
    "without_positions": "every parameter but the position embeddings",
}
POSITIONS = ("pos_embed", "unknown_pos_embed", "index_embed")


@dataclass(frozen=True, kw_only=True)
class ShareOptions:
    rank: int = 8
    """LoRA and adapters: width of the bottleneck."""
    train_head: bool = False
    """LoRA and adapters: the classifier is trained and shared as well."""
    targets: str = TARGETS
    """LoRA: names, or patterns of names, of the layers it stands beside."""
    alpha: float = 16.0
    """LoRA: its output is scaled by alpha / rank."""
    b_std: float = 0.0
    """LoRA: standard deviation of the second matrix; 0 is the first step, at which the first has no gradient."""


def share_part(model: nn.Module, part: str, seed: int, **options) -> nn.Module:
    """Return a copy of the model with the modules that `part` asks for, of which only these are trained.

    part: a key of PARTS; options: of ShareOptions. Raises UserError for a part that the model does not have.
    """
    told = ShareOptions(**options)
    if part == "all":
        return model
    model = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    if part == "without_positions":
        held = [name for name in names if name.rpartition(".")[2] in POSITIONS or name.startswith("pos_embed")]
        if not held:
            raise UserError(f"this {type(model).__name__} has no position embeddings to keep: use --share all")
        return _trained(model, [name for name in names if name not in held])
    head = head_of(model)
    if part == "head":
        return _trained(model, [f"{head}.*"])
    if part == "lora":
        add_lora(model, told.rank, seed, alpha=told.alpha, b_std=told.b_std, targets=told.targets)
    else:
        add_adapters(model, told.rank, seed)
    own = ["*.lora_a", "*.lora_b"] if part == "lora" else ["*.adapter.*"]
    return _trained(model, [*own, *([f"{head}.*"] if told.train_head else [])])


def head_of(model: nn.Module) -> str:
    """Return the name of the classifier, the last linear layer. Raises UserError for a model without one."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    classes = getattr(model, "arguments", {}).get("num_classes")
    fitting = [name for name in linear if model.get_submodule(name).out_features == classes]
    if not fitting:
        raise UserError(f"this {type(model).__name__} does not end in a linear classifier: use --share all")
    return fitting[-1]


def _trained(model: nn.Module, patterns: list[str]) -> nn.Module:
    """Freeze all parameters but those that a pattern names."""
    for name, value in model.named_parameters():
        value.requires_grad_(value.requires_grad and any(fnmatch(name, pattern) for pattern in patterns))
    return model
