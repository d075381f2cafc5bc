"""Clients that train and share a part of the network: everything else is frozen (requires_grad False).

Each part is a frozen dataclass whose fields are its options; `apply` returns the model with the modules that the part
asks for, of which only these are trained.
"""

import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import ClassVar

from torch import nn

from models.adapters import add_adapters
from models.lora import add_lora, read_adapter
from utils.errors import UserError

POSITIONS = ("pos_embed", "unknown_pos_embed", "index_embed", "pos_embedding", "position_embeddings")


@dataclass(frozen=True, kw_only=True)
class All:
    """Every parameter, and the base of all parts."""

    says: ClassVar[str] = ""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Return the model, a copy where anything changes. Raises UserError for a part that the model does not have."""
        return model


@dataclass(frozen=True, kw_only=True)
class Head(All):
    says: ClassVar[str] = "the classifier alone (linear probing)"

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        return _trained(copy.deepcopy(model), [f"{head_of(model)}.*"])


@dataclass(frozen=True, kw_only=True)
class WithoutPositions(All):
    says: ClassVar[str] = "everything but the position embeddings, which are frozen"

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        names = [name for name, _ in model.named_parameters()]
        held = [name for name in names if any(part in POSITIONS for part in name.split("."))]
        if not held:
            raise UserError(f"this {type(model).__name__} has no position embeddings to keep: use --share all")
        return _trained(copy.deepcopy(model), [name for name in names if name not in held])


@dataclass(frozen=True, kw_only=True)
class Lora(All):
    says: ClassVar[str] = "LoRA's two thin matrices"
    rank: int = 8
    """Rows of the first matrix."""
    targets: str = "*.qkv,*.proj,*.fc1,*.fc2"
    """Names, or patterns of names, of the linear layers it stands beside, separated by commas."""
    alpha: float = 16.0
    """Its output is scaled by alpha / rank."""
    b_std: float = 0.0
    """Standard deviation of the second matrix, as after some training; at 0, the first step, the first one has no
    gradient."""
    train_head: bool = False
    """The classifier is trained and shared as well."""
    config: str | None = None
    """adapter_config.json of peft, or the folder with it, in place of rank, alpha, targets and train_head."""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        if self.config is not None:
            model = self._of_peft(model).apply(model, seed)
            model.lora_dropout = read_adapter(self.config).dropout
            return model
        model = copy.deepcopy(model)
        head = [f"{head_of(model)}.*"] if self.train_head else []
        add_lora(model, self.rank, seed, alpha=self.alpha, b_std=self.b_std, targets=self.targets)
        return _trained(model, ["*.lora_a", "*.lora_b", *head])

    def _of_peft(self, model: nn.Module) -> "Lora":
        """Return these options with those of `config`. Raises UserError for some that are said twice."""
        own = Lora()
        twice = [key for key in ("rank", "targets", "alpha", "train_head") if getattr(self, key) != getattr(own, key)]
        if twice:
            raise UserError(f"share_options: config says {', '.join(twice)} already: give one of both")
        adapter = read_adapter(self.config)
        others = [name for name in adapter.saved if name != head_of(model).rpartition(".")[2]]
        if others:
            raise UserError(f"'{self.config}' trains {', '.join(others)} whole: only the classifier can be here")
        patterns = adapter.targets.split(",")
        found = [name for name, layer in model.named_modules() if type(layer) is not nn.Linear and _holds(layer)]
        if beside := next((name for name in found if any(fnmatch(name, pattern) for pattern in patterns)), None):
            kind = type(model.get_submodule(beside)).__name__
            raise UserError(
                f"'{self.config}' has a LoRA beside '{beside}', a {kind}: only linear layers can have one here"
            )
        found = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets}
        return replace(self, config=None, train_head=bool(adapter.saved), **found)


@dataclass(frozen=True, kw_only=True)
class Adapters(All):
    says: ClassVar[str] = "the adapters behind the blocks"
    rank: int = 8
    """Width of each adapter."""
    train_head: bool = False
    """The classifier is trained and shared as well."""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        model = copy.deepcopy(model)
        head = [f"{head_of(model)}.*"] if self.train_head else []
        add_adapters(model, self.rank, seed)
        return _trained(model, ["*.adapter.*", *head])


def _holds(layer: nn.Module) -> bool:
    """Return whether a layer has weights of its own, beside which peft puts a LoRA where its name fits."""
    return isinstance(getattr(layer, "weight", None), nn.Parameter)


def head_of(model: nn.Module) -> str:
    """Return the name of the classifier, the last linear layer with an output for every class. Raises UserError for a
    model without one."""
    classes = getattr(model, "arguments", {}).get("num_classes")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    fitting = [name for name, layer in layers if layer.out_features == classes]
    if not fitting:
        raise UserError(f"this {type(model).__name__} does not end in a linear classifier: use --share all")
    return fitting[-1]


def _trained(model: nn.Module, patterns: list[str]) -> nn.Module:
    """Freeze all parameters but those that a pattern names."""
    for name, value in model.named_parameters():
        value.requires_grad_(value.requires_grad and any(fnmatch(name, pattern) for pattern in patterns))
    return model
