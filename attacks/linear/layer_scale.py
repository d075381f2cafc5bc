"""Fold LayerScale into the linear layer in front of it: a leak, seen as that of a model without LayerScale.

DINOv2, DeiT-III and others multiply what a branch adds to the tokens by a learned vector, z + gamma * (P o + q). That
is the function of a model without LayerScale whose layer has P' = diag(gamma) P and q' = gamma * q, and since the
gradient by its output g' reaches P as gamma * g',

    dL/dP' = sum_i g'_i o_i^T = diag(1 / gamma) dL/dP,      dL/dq' = dL/dq / gamma.

The same holds for the second layer of the MLP. So attacks by linear equations never meet a LayerScale: they ask for the
folded leak first.

Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, for LayerScale; the folding is derived for
this project.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.threat_model.leak import Leak, RefusalError

# Of a block: the module or the parameter that scales a branch, and the last linear layer of that branch. BEiT and its
# kin keep bare parameters.
BRANCHES = (
    ("ls1.gamma", "attn.proj"),
    ("ls2.gamma", "mlp.fc2"),
    ("gamma_1", "attn.proj"),
    ("gamma_2", "mlp.fc2"),
)


def fold_layer_scale(leak: Leak) -> Leak:
    """Return the leak as one of the same function without LayerScale; the leak itself where its model has none.

    The model is a copy in float64, on its device, in which `ls1` and `ls2` are nn.Identity and BEiT's `gamma_1` and
    `gamma_2` None; its gradients of `attn.proj` and `mlp.fc2` are float64 too, so that folding rounds nothing, and
    those of gamma are gone. A channel
    whose gamma is 0 passes nothing back to its row, whose folded gradient is then unknown: a layer with such channels
    is left out of the gradients (`lost_layers` names it). Nothing else changes.
    """
    if not any(True for _ in scaled_layers(leak.model)):
        return leak
    lost, gradients = lost_layers(leak.model), dict(leak.gradients)
    model = copy.deepcopy(leak.model).double()
    for scale, name, gamma in list(scaled_layers(model)):
        gradients.pop(scale, None)
        layer = model.get_submodule(name)
        for part, value in layer.named_parameters():
            factor = gamma.detach().view(-1, *[1] * (value.dim() - 1))  # one for each output channel
            with torch.no_grad():
                value.mul_(factor)
            shared = gradients.pop(f"{name}.{part}", None)
            if shared is not None and name not in lost:
                gradients[f"{name}.{part}"] = shared.double() / factor.to(shared.device)
        parent, _, child = scale.removesuffix(".gamma").rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity() if scale.endswith(".gamma") else None)
    order = [name for name, _ in model.named_parameters() if name in gradients]  # as every leak: that of the model
    return replace(leak, model=model, gradients={name: gradients[name] for name in order})


def check_not_lost(model: nn.Module, names: Iterable[str], attack: str) -> None:
    """Raise UserError where LayerScale passes nothing back to some channels of one of the parameters `names`."""
    for layer in lost_layers(model):
        if any(name.startswith(f"{layer}.") for name in names):
            raise RefusalError(
                f"attack '{attack}' needs the whole gradient of '{layer}', and LayerScale passes nothing back to the "
                f"channels it multiplies by 0"
            )


def lost_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers behind which LayerScale is 0 in some channel, e.g. 'blocks.0.attn.proj'."""
    return [name for _, name, gamma in scaled_layers(model) if not bool(gamma.all())]


def scaled_layers(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield for every LayerScale of a ViT's blocks the name of its parameter, that of the linear layer before it, and
    gamma (D,)."""
    for number, block in enumerate(getattr(model, "blocks", ())):
        layers, own = dict(block.named_modules()), dict(block.named_parameters())
        for scale, layer in BRANCHES:
            gamma = own.get(scale)
            if gamma is not None and isinstance(layers.get(layer), nn.Linear):
                yield f"blocks.{number}.{scale}", f"blocks.{number}.{layer}", gamma
