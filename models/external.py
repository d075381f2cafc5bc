"""Any model as a victim: of timm, torchvision or HuggingFace, or built by a function in a Python file.

    timm:vit_small_patch16_224    torchvision:resnet18    hf:NAME_OR_FOLDER    path/to/net.py:factory

The network keeps its class and the names of its parameters, under which its gradients come. What models/__init__.py
asks of a model is added as plain attributes: `grid` and `patch_size` (of its patches, or cells to score in),
`hides_positions` (false), `arguments`, `normalize` and `classes`. One that has them already keeps its own.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from timm.layers import PatchEmbed
from torch import Tensor, nn

from models.archives import check_numbers
from models.checkpoints import read_checkpoint
from models.containers import misfit, plain_weights
from models.huggingface_models import is_huggingface, open_huggingface
from models.timm_models import open_timm
from utils.channels import channels_of
from utils.errors import UserError, did_you_mean, kind_and_reason
from utils.notes import Notes

SIZES = ("image_size", "img_size")  # what builders call the side of their input
CELL = 16  # pixels: cells to score in, for networks without patches of their own; smaller where the side asks for it


def is_external(name: str | None) -> bool:
    """Return whether the name of a model says where it comes from."""
    return name is not None and ":" in name


def open_external(
    spec: str,
    *,
    checkpoint: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
    ema: bool = False,
    **options,
) -> nn.Module:
    """Return the model `spec` names, in evaluation mode on the CPU.

    Its weights are those of the file `checkpoint` (with ema: the averaged ones in it), or drawn after
    `torch.manual_seed(seed)`. The model says in `assumed` what nobody told. image_size: side of its input, which its
    builder gets where it takes an image_size or img_size. options: keyword arguments of
    timm.create_model, of torchvision's builder, or of the function. A Python file is executed, with all that it
    does. Raises UserError, with the message of what was raised.
    """
    notes = Notes()
    if is_huggingface(spec):
        network = open_huggingface(spec, checkpoint=checkpoint, image_size=image_size, seed=seed, ema=ema, **options)
        if getattr(network, "arguments", None) is None:
            adopt(network, spec, network.patch_embed.img_size[0], network.normalize)
        return network
    kind, _, name = spec.rpartition(":")
    if kind == "timm":
        model = open_timm(name, checkpoint=checkpoint, image_size=image_size, seed=seed, ema=ema, **options)
        network, normalize, side = model.network, model.normalize, model.arguments["image_size"]
        network.normalize_from, notes.assumed = model.normalize_from, model.assumed
    else:
        build = _torchvision_builder(name) if kind == "torchvision" else _factory(Path(kind), name)
        network, normalize = _call(build, spec, seed, options), None
        own = _size_option(build, network)
        if image_size and own and not set(SIZES) & set(options):
            network = _call(build, spec, seed, options | {own: image_size})
        side = image_size or _side(network)
        if side is None:
            side = 224
            notes.assume("image_size", f"images of {side} pixels: neither --image_size nor the model says which")
        if checkpoint:
            _load(network, checkpoint, spec, ema, notes)
    adopt(network, spec, side, normalize)
    network.assumed = notes.assumed
    return network.eval()


def adopt(network: nn.Module, name: str, image_size: int, normalize: dict | None = None) -> None:
    """Add what this project asks of a model, where the network does not say it itself; `spec` says where it is from.
    Raises UserError unless it maps (1, C, image_size, image_size) to finite logits (1, classes)."""
    patch = next((part.patch_size[0] for part in network.modules() if isinstance(part, PatchEmbed)), None)
    patch = patch or getattr(network, "patch_size", None)
    if not isinstance(patch, int) or image_size % patch:
        patch = next(cell for cell in range(min(CELL, image_size), 0, -1) if image_size % cell == 0)
    channels = channels_of(network)
    blank = torch.zeros(1, channels, image_size, image_size)
    try:
        with torch.no_grad():
            logits = network.eval()(blank.to(next(network.parameters())))
    except Exception as error:  # anything can go wrong in a model from outside
        kind = "grey" if channels == 1 else "RGB"
        problem = f"fails on one {image_size} x {image_size} {kind} image ({kind_and_reason(error)})"
        raise UserError(f"model '{name}' {problem}: is --image_size what it was built for?") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1 or not logits.shape[1]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        remedy = "wrap it in a function of a Python file that returns its logits (--model FILE.py:FUNCTION)"
        raise UserError(
            f"model '{name}' must map an image to a tensor of logits (1, classes), and gives {got}: {remedy}"
        )
    if not logits.isfinite().all():
        raise UserError(f"model '{name}' gives NaN or infinity for a grey image: check its weights and normalisation")
    about = {
        "grid": (image_size // patch, image_size // patch), "patch_size": patch, "hides_positions": False,
        "arguments": {"name": name, "num_classes": logits.shape[1], "image_size": image_size},
        "normalize": normalize, "classes": None,
    }  # fmt: skip
    network.spec = name
    for key, value in about.items():
        if getattr(network, key, None) is None or key == "patch_size":
            setattr(network, key, value)


def _call(build: Callable[..., nn.Module], spec: str, seed: int, options: dict) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = build(**options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model '{spec}' cannot be built: {kind_and_reason(error)}") from error
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise UserError(f"model '{spec}' must be a torch.nn.Module with parameters, not a {type(network).__name__}")
    return network


def _size_option(build: Callable, network: nn.Module) -> str | None:
    """Return the name under which a builder takes the side of the input; None where it takes none.

    It is in the builder's signature or, where that passes on any keyword (as torchvision's do), in the signature of the
    network's class.
    """
    taken = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        taken = {**inspect.signature(type(network).__init__).parameters, **taken}
    return next((name for name in SIZES if name in taken), None)


def _side(network: nn.Module) -> int | None:
    """Return the side of the input that a network says it was built for."""
    said = [(getattr(network, "arguments", None) or {}).get("image_size"), getattr(network, "image_size", None)]
    said += [part.img_size for part in network.modules() if isinstance(part, PatchEmbed)]
    sides = [one[0] if isinstance(one, (tuple, list)) else one for one in said]
    return next((side for side in sides if isinstance(side, int) and side > 0), None)


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"unknown torchvision model '{name}': {did_you_mean(name, known)}")
    return lambda **options: torchvision.models.get_model(name, **{"weights": None} | options)


def _factory(path: Path, name: str) -> Callable[..., nn.Module]:
    """Return the function `name` of a Python file, which is executed."""
    if not path.is_file() or path.suffix != ".py":
        forms = "NAME, timm:NAME, torchvision:NAME, hf:NAME or FILE.py:FUNCTION"
        raise UserError(f"--model '{path}:{name}': there is no Python file '{path}'; models are named {forms}")
    module_name = f"model_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and pickling look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"model file '{path}' fails when it is run: {kind_and_reason(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"model file '{path}' has no function '{name}': {did_you_mean(name, own)}")
    return found


def _load(network: nn.Module, checkpoint: str, spec: str, ema: bool, notes: Notes) -> None:
    own = network.state_dict()
    weights = plain_weights(read_checkpoint(checkpoint), checkpoint, own, all_names=True, ema=ema, notes=notes)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint '{checkpoint}' does not fit model '{spec}' ({misfit(error)})") from error
    check_numbers(weights, own, checkpoint)
