"""LoRA: a frozen linear layer plus a trained product of two thin matrices (Hu et al., ICLR 2022).

    y = W x + b + (alpha / rank) B A x        A (rank, in) is drawn, B (out, rank) starts at zero

The gradient of A is B^T times what comes back: zero at the first step, when B is.
"""

import json
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError, reason
from utils.files import existing_file

NOT_PLAIN = (
    *("use_dora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("layer_replication", "exclude_modules", "target_parameters", "fan_in_fan_out", "use_bdlora", "arrow_config"),
    *("megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "monteclora_config"),
    *("kasa_config", "layers_pattern"),
)
NEW_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that change the frozen weights as well


class Adapter(NamedTuple):
    """What peft's adapter_config.json says; alpha / rank is the scale of its product, `saved` what it trains whole,
    `dropout` the share of its inputs that a step in training mode leaves out."""

    rank: int
    alpha: float
    targets: str
    saved: tuple[str, ...]
    dropout: float = 0.0


class LoraLinear(nn.Linear):
    """A linear layer with `lora_a` (rank, in) and `lora_b` (out, rank); it takes weight and bias of `layer`."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, b_std: float):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scaling = alpha / rank
        like = layer.weight
        self.lora_a = nn.Parameter(torch.empty(rank, layer.in_features, device=like.device, dtype=like.dtype))
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, device=like.device, dtype=like.dtype))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        if b_std:
            nn.init.normal_(self.lora_b, std=b_std)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + self.scaling * nn.functional.linear(
            nn.functional.linear(inputs, self.lora_a), self.lora_b
        )


def add_lora(
    model: nn.Module, rank: int, seed: int, *, alpha: float = 16.0, b_std: float = 0.0, targets: str
) -> nn.Module:
    """Replace linear layers inside the blocks of a ViT by `LoraLinear`, in place; the names of their weights stay.

    targets: patterns of layer names, separated by commas. b_std: of B, as after some training; 0 is the first step.
    Raises UserError where no layer has such a name, and for a rank above the width of one.
    """
    patterns = [pattern.strip() for pattern in targets.split(",") if pattern.strip()]
    chosen = [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and any(fnmatch(name, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise UserError(f"no linear layer of this {type(model).__name__} is called like '{targets}'")
    widest = min(min(model.get_submodule(name).weight.shape) for name in chosen)
    if not 1 <= rank <= widest:
        raise UserError(f"the rank of LoRA must be from 1 to {widest}, the width of the layers, got {rank}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name in chosen:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LoraLinear(model.get_submodule(name), rank, alpha, b_std))
    return model


def read_adapter(path: str) -> Adapter:
    """Return what an adapter_config.json of peft says, given the file or its folder. Raises UserError, also for an
    adapter that is no plain LoRA of layers listed by name."""
    file = existing_file(Path(path) / "adapter_config.json" if Path(path).is_dir() else path, "configuration of peft")
    try:
        config = json.loads(file.read_text())
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise UserError(f"'{file}' is an adapter of kind {kind}: only a plain LoRA is known here")
        dropout = float(config.get("lora_dropout") or 0)
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
        saved = tuple(config.get("modules_to_save") or ())
    except KeyError as error:
        raise UserError(f"'{file}' is no adapter_config.json of a LoRA of peft: it has no {error}") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"'{file}' is no adapter_config.json of a LoRA of peft: {reason(error)}") from error
    said = {key: config[key] for key in NOT_PLAIN if key in config}
    odd = [key for key, value in said.items() if value or type(value) is int]  # layers_to_transform 0: the first layer
    odd += ["bias"] * (config.get("bias", "none") != "none")
    start = config.get("init_lora_weights")
    odd += ["init_lora_weights"] * (isinstance(start, str) and start.startswith(NEW_BASE))
    if odd or not isinstance(targets, list):
        what = ", ".join(odd) or "target_modules that are a pattern"
        raise UserError(f"'{file}' has {what}: only a plain LoRA of listed layers is known here")
    if config.get("use_rslora"):  # scaled by alpha / sqrt(rank)
        alpha *= math.sqrt(rank)
    return Adapter(rank, alpha, ",".join(f"{name},*.{name}" for name in sorted(targets)), saved, dropout)
