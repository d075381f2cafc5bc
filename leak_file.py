"""Leak files: what one client sent in one round of a real training, for `attack.py --leak` to say what it gives away.

    from leak_file import save
    loss.backward()
    save("step.safetensors", model, batch_size=len(images), image_shape=images.shape[1:], mean=MEAN, std=STD)

This file needs torch and safetensors and nothing of the rest of the project: copy it beside a training script.
`python leak_file.py FILE` prints what a file holds. docs/leak_files.md has the format and recipes.

A safetensors file whose header holds `leak`, a JSON object with the fields of `About`, and `sha256` over that text and
all tensors: gradient/NAME, or before/NAME and after/NAME; with a gradient before/NAME are the weights it was taken at;
labels. No code is ever read from it, and pickles are refused.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VERSION = 1
SUFFIX = ".safetensors"
WRAPPERS = ("module.", "_orig_mod.", "_module.")  # of DistributedDataParallel, torch.compile and Opacus
PICKLES = (b"PK\x03\x04", b"\x80")  # what files of torch.save and pickle start with


class LeakFileError(ValueError):
    """A leak that cannot be written or read. The message is one line: what is wrong, where, and what to do."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a round beside its tensors.

    batch_size: images behind the gradient or update, in all. image_shape (C, H, W) as the model saw them. mean, std:
    normalisation of pixels in [0, 1], None where the model's own is meant. loss: `cross_entropy` is the mean over the
    batch with hard labels, which attacks that match gradients repeat; name anything else, they then stand aside.
    training: the model was in training mode. masked: MJP hid positions in this round; None where nobody knows.
    lr, steps, local_batch_size: of an update, plain SGD steps of rate lr on consecutive slices of so many images.
    """

    batch_size: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    loss: str = "cross_entropy"
    training: bool = False
    masked: bool | None = None
    lr: float | None = None
    steps: int | None = None
    local_batch_size: int | None = None
    note: str = ""

    def __post_init__(self):
        def need(condition: bool, key: str, rule: str) -> None:
            if not condition:
                raise LeakFileError(f"{key} of a leak must be {rule}, got {getattr(self, key)!r}")

        for key in ("batch_size", "steps", "local_batch_size"):
            value = getattr(self, key)
            need(_whole(value) and value >= 1 if value is not None else key != "batch_size", key, "a number from 1 on")
        need(_numbers(self.image_shape, 3) and all(_whole(n) and n >= 1 for n in self.image_shape), "image_shape",
             "three sizes (channels, height, width)")  # fmt: skip
        for key in ("mean", "std"):
            need(
                getattr(self, key) is None or _numbers(getattr(self, key), self.image_shape[0]),
                key,
                "one number per channel",
            )
        need(self.std is None or min(self.std) > 0, "std", "above 0")
        need(isinstance(self.loss, str) and bool(self.loss), "loss", "a name")
        need(isinstance(self.training, bool), "training", "true or false")
        need(self.masked is None or isinstance(self.masked, bool), "masked", "true, false or null")
        need(self.lr is None or (_numbers((self.lr,), 1) and self.lr > 0), "lr", "a number above 0")
        need(isinstance(self.note, str), "note", "text")


@dataclass(frozen=True)
class LeakFile:
    """A leak file in memory: tensors by parameter name, on the CPU. `gradients`, or `before` and `after` (state dicts);
    beside gradients `before` may hold the weights they were taken at. labels (B,) int64 where they are known."""

    about: About
    gradients: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None

    @property
    def is_update(self) -> bool:
        return bool(self.after)

    def check(self) -> None:
        """Raise LeakFileError unless the tensors make a leak: finite, not all zero, and complete."""
        if bool(self.gradients) == self.is_update:
            raise LeakFileError("a leak holds either gradients, or the weights before and after an update")
        if self.is_update and (self.before.keys() != self.after.keys() or not self.before):
            odd = sorted(self.before.keys() ^ self.after.keys())
            raise LeakFileError(f"the weights before and after an update have other names: {_some(odd)}")
        if self.is_update and (self.about.lr is None or self.about.steps is None):
            raise LeakFileError("an update needs lr and steps, the learning rate and number of the client's SGD steps")
        for name, value in self.after.items():
            if self.before[name].shape != value.shape:
                shapes = f"{tuple(self.before[name].shape)} and {tuple(value.shape)}"
                raise LeakFileError(f"'{name}' has the shapes {shapes} before and after the update")
        for kind in (self.gradients, self.before, self.after):
            broken = [name for name, value in kind.items() if value.is_floating_point() and not value.isfinite().all()]
            if broken:
                raise LeakFileError(f"NaN or infinity in {_some(broken)}: nothing can be reconstructed from it")
        if self.gradients and not any(value.any() for value in self.gradients.values()):
            raise LeakFileError("the gradients are all zero: save after backward() and before zero_grad()")
        if self.is_update and all(self.before[name].equal(value) for name, value in self.after.items()):
            raise LeakFileError("the update is all zero: the weights before and after are the same")
        if self.labels is not None and tuple(self.labels.shape) != (self.about.batch_size,):
            raise LeakFileError(f"labels have the shape {tuple(self.labels.shape)}, not ({self.about.batch_size},)")


def save(
    path: str | os.PathLike,
    gradients: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    before: nn.Module | Mapping[str, Tensor] | None = None,
    after: nn.Module | Mapping[str, Tensor] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    **about,
) -> None:
    """Write what a client sent to `path`, which ends in .safetensors, atomically.

    gradients: by parameter name, or the model after backward(), whose `.grad` are taken. Or before and after: state
    dicts, or models, around the client's SGD steps. before, beside gradients: the weights the attacker also knows; else
    it needs them from elsewhere. about: the fields of `About`. Mixed-precision gradients must be unscaled first. Raises
    LeakFileError for anything no attack could use, such as gradients that are all zero.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise LeakFileError(f"'{path}': the name of a leak file ends in {SUFFIX}")
    if isinstance(gradients, nn.Module):
        gradients = {name: value.grad for name, value in gradients.named_parameters() if value.grad is not None}
        if not gradients:
            raise LeakFileError("no parameter has a gradient: save after backward() and before zero_grad()")
    weights = [value.state_dict() if isinstance(value, nn.Module) else value for value in (before, after)]
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64).detach().cpu()
    for key in ("image_shape", "mean", "std"):
        about[key] = None if about.get(key) is None else tuple(getattr(about[key], "tolist", lambda k=key: about[k])())
    unknown = sorted(about.keys() - {item.name for item in fields(About)})
    missing = [key for key in ("batch_size", "image_shape") if about.get(key) is None]
    if unknown or missing:
        raise LeakFileError(f"save() {'does not know' if unknown else 'needs'} {_some(unknown or missing)}")
    leak = LeakFile(About(**about), *(_unwrapped(value or {}) for value in (gradients, *weights)), labels)
    leak.check()
    write(path, leak)


def write(path: str | os.PathLike, leak: LeakFile) -> None:
    """Write a leak without looking at it; `save` is for users."""
    tensors = {f"gradient/{name}": value for name, value in leak.gradients.items()}
    tensors |= {f"before/{name}": value for name, value in leak.before.items()}
    tensors |= {f"after/{name}": value for name, value in leak.after.items()}
    tensors |= {} if leak.labels is None else {"labels": leak.labels}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps({"format": "leak", "version": VERSION} | asdict(leak.about))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {"leak": text, "sha256": _digest(text, tensors)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> LeakFile:
    """Read and check a leak file. Raises LeakFileError for files that are missing, truncated, changed since they were
    written, pickled, of a later version, or hold no usable leak."""
    about = read_about(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("sha256") != _digest(header["leak"], tensors):
        raise LeakFileError(f"leak file '{path}' was changed since it was written: its checksum does not fit")
    parts = [_part(tensors, kind) for kind in ("gradient/", "before/", "after/")]
    leak = LeakFile(about, *parts, tensors.get("labels"))
    try:
        leak.check()
    except LeakFileError as error:
        raise LeakFileError(f"leak file '{path}': {error}") from error
    return leak


def read_about(path: str | os.PathLike) -> About:
    """What the header of a leak file says, without reading its tensors. Raises LeakFileError."""
    path = Path(path)
    if not path.is_file():
        raise LeakFileError(f"leak file '{path}' does not exist")
    with open(path, "rb") as file:
        if file.read(4).startswith(PICKLES):
            raise LeakFileError(
                f"leak file '{path}' is a pickle, which can run code when it is opened: refused; write it with save()"
            )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LeakFileError(f"leak file '{path}' is truncated or not a leak file ({error})") from error
    if "leak" not in header:
        raise LeakFileError(f"'{path}' holds tensors but does not say of what: write leak files with save()")
    try:
        stated = json.loads(header["leak"])
        if stated.pop("format") != "leak" or stated.pop("version") > VERSION:
            raise LeakFileError(f"it is of a later version than {VERSION}: use a newer leak_file.py")
        return About(**{key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()})
    except LeakFileError as error:
        raise LeakFileError(f"leak file '{path}': {error}") from error
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise LeakFileError(f"leak file '{path}': its description does not make sense ({error})") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, type, shape and bytes. It finds accidents; whoever wants
    to forge a file can compute it too."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that a wrapper of the model has put before every name."""
    tensors = dict(tensors)
    while prefix := next((one for one in WRAPPERS if tensors and all(name.startswith(one) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values, length: int) -> bool:
    real = [isinstance(value, (int, float)) and math.isfinite(value) for value in values] if values else []
    return len(real) == length and all(real)


def _some(names: Sequence[str]) -> str:
    """Names for a message: the first three and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in list(names)[:3]) + more


def describe(leak: LeakFile) -> str:
    """What a leak file holds, as text."""
    lines = [f"{key}: {value}" for key, value in asdict(leak.about).items() if value not in (None, "")]
    lines.append(f"labels: {'not in the file' if leak.labels is None else leak.labels.tolist()}")
    for kind in ("gradients", "before", "after"):
        tensors = getattr(leak, kind)
        if tensors:
            lines.append(f"{kind}: {len(tensors)} tensors, {sum(value.numel() for value in tensors.values())} values")
            lines += [f"  {name} {tuple(value.shape)}" for name, value in tensors.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise LeakFileError("usage: python leak_file.py FILE")
        print(describe(load(sys.argv[1])))
    except LeakFileError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
