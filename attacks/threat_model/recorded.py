"""From a leak file of a real training (leak_file.py) to the Leak an attack sees: does it fit the model?"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.leak import Leak, LocalSteps
from leak_file import SUFFIX, WRAPPERS, About, LeakFile, LeakFileError, load, read_about
from models.layouts import HUGGINGFACE_VIT, from_huggingface_vit, rename
from utils.channels import channels_of
from utils.errors import UserError

PEFT = (  # what peft calls its parts, and what they are called here (models/lora.py)
    (re.compile(r"^base_model\.model\."), ""),
    (re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.weight$"), lambda found: f".lora_{found[1].lower()}"),
    (re.compile(r"\.base_layer\."), "."),
    (re.compile(r"\.modules_to_save\.[^.]+\."), "."),
)
HUGGINGFACE = re.compile(r"^(?:vit|deit|dinov2)\.")  # what its classifiers call the network before them
FROZEN_COPY = ".original_module."  # peft keeps the untrained version of a layer that it trains as a whole


def list_leaks(path: str) -> list[Path]:
    """Return the leak file, or those of a folder in sorted order. Raises UserError where there is none."""
    found = sorted(Path(path).glob(f"[!.]*{SUFFIX}")) if Path(path).is_dir() else [Path(path)]
    if not found:
        raise UserError(f"folder '{path}' holds no leak files (*{SUFFIX})")
    return found


def about_leak(path: str | Path) -> About:
    """Return what the header of a leak file says. Raises UserError."""
    try:
        return read_about(path)
    except LeakFileError as error:
        raise UserError(str(error)) from error


def open_leak(
    path: str | Path,
    model: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    attacker_knowledge: str = "method",
) -> Leak:
    """Return the Leak in a file, for a model on its device and in its precision. mean, std: if it says none.

    An update is divided by -(steps * lr), as in attacks/threat_model/client.py; tensors that did not change took no
    part in it. Where the file holds the weights before the round they are the model's, in a copy. Raises UserError
    naming parameters and shapes that do not fit.
    """
    try:
        file = load(path)
    except LeakFileError as error:
        raise UserError(str(error)) from error
    about, like = file.about, next(model.parameters())
    file = with_names_of(model, file, path)
    if file.before:
        model = with_weights(model, file.before, path)
    if file.is_update:
        names = dict(model.named_parameters())
        rate = about.lr * about.steps
        changes = {name: (file.before[name], file.after[name]) for name in names if name in file.after}
        gradients = {name: (one - two) / rate for name, (one, two) in changes.items() if not one.equal(two)}
        for name, value in model.named_parameters():  # what did not change took no part in the client's steps
            value.requires_grad_(name in gradients)
    else:
        gradients = file.gradients
    check_fit(gradients, model, path)
    # In the model's order from here on, whatever the file's: sums over tensors then round as in the process itself.
    side = model.arguments["image_size"]
    channels = channels_of(model)
    if about.image_shape != (channels, side, side):
        wanted = f"{side} x {side} {'grey' if channels == 1 else 'RGB'} images"
        raise UserError(f"leak file '{path}' is of images {about.image_shape}, the model takes {wanted}: --image_size?")
    classes = model.arguments.get("num_classes")
    if file.labels is not None and classes and int(file.labels.max()) >= classes:
        raise UserError(
            f"leak file '{path}' has the label {int(file.labels.max())}, and the model {classes} classes, from 0 on: "
            f"check --model and --model_options"
        )
    local = None
    each = min(about.local_batch_size or about.batch_size, about.batch_size)
    if file.is_update and (about.steps > 1 or each < about.batch_size):
        local = LocalSteps(about.steps, about.lr, each)
    return Leak(
        model=model,
        gradients={name: gradients[name].to(like) for name, _ in model.named_parameters() if name in gradients},
        image_shape=about.image_shape,
        batch_size=about.batch_size,
        labels=None if file.labels is None else file.labels.to(like.device),
        mean=tuple(about.mean or mean),
        std=tuple(about.std or std),
        local=local,
        training=about.training,
        attacker_knowledge=attacker_knowledge,
    )


def with_names_of(model: nn.Module, file: LeakFile, path: str | Path) -> LeakFile:
    """Return the leak under the model's names, where they differ by the prefix of a wrapper alone, or are peft's.
    Raises UserError for two adapters of peft in one leak.

    A network may have an attribute of its own that is called as wrappers call theirs (`module`); the file, which saw
    names only, has taken it for one.
    """
    own = set(model.state_dict())
    parts = {key: getattr(file, key) for key in ("gradients", "before", "after")}
    names = {name for part in parts.values() for name in part}
    parameters = own | {name for name, _ in model.named_parameters()}
    if names <= parameters:  # a model of peft itself, too
        return file
    if any(name.startswith("base_model.model.") or ".lora_A." in name for name in names):
        return replace(file, **{key: _from_peft(part, path) for key, part in parts.items()})
    prefix = next((one for one in WRAPPERS if {f"{one}{name}" for name in names} <= own), None)
    if prefix is None:
        theirs = {key: _from_huggingface(part) for key, part in parts.items()}
        return replace(file, **theirs) if all(part.keys() <= parameters for part in theirs.values()) else file
    return replace(file, **{key: {f"{prefix}{name}": v for name, v in part.items()} for key, part in parts.items()})


def _from_huggingface(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that HuggingFace's ViT, DeiT or DINOv2 has here, others as they are. Queries, keys
    and values are one matrix, so that all three are needed, or none."""
    part = {HUGGINGFACE.sub("", name): value for name, value in part.items()}
    kinds = [sum(f".attn.{kind}." in name for name in rename(part, HUGGINGFACE_VIT)) for kind in "qkv"]
    return from_huggingface_vit(part) if len({*kinds}) == 1 else part


def _from_peft(part: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return tensors by the names that their layers have without peft: LoRA's matrices become lora_a and lora_b. Raises
    UserError where two have the same name then: which of two adapters worked, names do not say."""
    found = {}
    for name, value in part.items():
        own = name
        for pattern, new in PEFT:
            own = pattern.sub(new, own)
        if FROZEN_COPY in name:
            continue
        if own in found:
            raise UserError(
                f"leak file '{path}' holds two adapters of peft ('{own}' twice): save it with the one that was trained"
            )
        found[own] = value
    return found


def with_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> nn.Module:
    """Return a copy of the model with the weights of a leak file, all of which must fit."""
    own = model.state_dict()
    _complain("weights", weights, own, path, missing=[name for name in own if name not in weights])
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    return model


def check_fit(gradients: dict[str, Tensor], model: nn.Module, path: str | Path) -> None:
    """Raise UserError unless every gradient is one of the model's, in name and shape. Absent ones were withheld."""
    _complain("gradients", gradients, dict(model.named_parameters()), path)


def _complain(what: str, given: dict, own: dict, path: str | Path, missing: Sequence[str] = ()) -> None:
    problems = {
        "not in the model": [name for name in given if name not in own],
        "missing": list(missing),
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in given.items()
            if name in own and own[name].shape != value.shape
        ],
    }
    if not any(problems.values()):
        return
    listed = "; ".join(
        f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    )
    raise UserError(f"leak file '{path}' does not fit the model: {what} {listed}; check --model and --model_options")


def withheld(leak: Leak) -> list[str]:
    """Return the names of the model's parameters whose gradients the leak does not hold."""
    return [name for name, _ in leak.model.named_parameters() if name not in leak.gradients]


def hidden_patches(leak: Leak) -> Tensor:
    """Return (1, N) bool: patches MJP hid, as the leak itself shows, to score visible and hidden ones apart."""
    number = leak.model.grid[0] * leak.model.grid[1]
    hidden = hidden_rows(leak) if getattr(leak.model, "hides_positions", False) else None
    return torch.zeros(1, number, dtype=torch.bool) if hidden is None else hidden[None].cpu()
