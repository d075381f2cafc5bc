"""Trained weights from the hubs of timm, torchvision and transformers, where there is a network that reaches them."""

from collections.abc import Callable

import timm
import torchvision
from torch import Tensor, nn

from utils.errors import UserError, did_you_mean, kind_and_reason, look_up

ADVICE = "where there is no network, take a name of --list, or copy the file here and pass it as --checkpoint"


def _from_timm(name: str) -> tuple[nn.Module, str]:
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"unknown timm model '{name}': {did_you_mean(name, timm.list_pretrained())}")
    network = timm.create_model(name, pretrained=True)
    return network, str(network.pretrained_cfg.get("license"))


def _from_torchvision(name: str) -> tuple[nn.Module, str]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"unknown torchvision model '{name}': {did_you_mean(name, known)}")
    return torchvision.models.get_model(name, weights="DEFAULT"), "BSD-3-Clause"


def _from_transformers(name: str) -> tuple[nn.Module, str]:
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers:NAME needs the package transformers: pip install transformers") from error
    return transformers.AutoModel.from_pretrained(name), "see the model card"


HUBS: dict[str, Callable[[str], tuple[nn.Module, str]]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}


def from_hub(spec: str) -> tuple[dict[str, Tensor], dict, dict]:
    """Return (weights, description, header) of HUB:NAME. Raises UserError where the hub cannot be reached."""
    kind, _, name = spec.partition(":")
    load = look_up(HUBS, kind, "hub")
    try:
        network, licence = load(name)
    except UserError:
        raise
    except Exception as error:  # what a download can raise depends on the client
        raise UserError(f"cannot get '{spec}' from its hub ({kind_and_reason(error)}): {ADVICE}") from error
    config = network.config.to_dict() if kind == "transformers" else {}
    kept = {key: config[key] for key in config if isinstance(config[key], (int, float, str))}
    header = {"source": spec, "licence": licence, "about": f"{name} of {kind}", "check": "none"}
    return dict(network.state_dict()), kept, header
