"""Leak files: what one client sent in one round of a real training, for `attack.py --leak` to say what it gives away.

    from leak_file import save
    loss.backward()
    save("step.safetensors", model, batch_size=len(images), image_shape=images.shape[1:], mean=MEAN, std=STD)

This file needs torch and safetensors and nothing of the rest of the project: copy it beside a training script.
`python leak_file.py FILE` prints what a file holds. docs/leak_files.md has the format and recipes.

A safetensors file with tensors gradient/NAME (and before/NAME, its weights), or before/NAME and after/NAME, and labels.
The header holds `leak`, the fields of `About` in JSON, and `sha256` over all. No code is read from it: no pickles.
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
Tensors = Mapping[str, Tensor] | Sequence[Tensor]  # or arrays of NumPy, of Flower, ...
WRAPPERS = ("module.", "_orig_mod.", "_module.")  # of DistributedDataParallel, torch.compile and Opacus
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch, in the middle of names too
WRAPPING = {"DistributedDataParallel": "module", "DataParallel": "module", "DeepSpeedEngine": "module",
            "DifferentiallyPrivateDistributedDataParallel": "module", "OptimizedModule": "_orig_mod",
            "GradSampleModule": "_module", "FullyShardedDataParallel": "_fsdp_wrapped_module"}  # fmt: skip
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
            need(
                type(value) is int and value >= 1 if value is not None else key != "batch_size",
                key,
                "a number from 1 on",
            )
        need(_numbers(self.image_shape, 3) and all(type(n) is int and n >= 1 for n in self.image_shape), "image_shape",
             "three sizes (channels, height, width)")  # fmt: skip
        for key in ("mean", "std"):
            value = getattr(self, key)
            need(value is None or _numbers(value, self.image_shape[0]), key, "one number per channel")
        need(self.std is None or all(1e-3 <= one <= 1e3 for one in self.std), "std", "from 0.001 to 1000")
        need(self.batch_size <= 10**6, "batch_size", "a million images at most")
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
        if self.is_update and (odd := sorted(self.before.keys() ^ self.after.keys())):
            raise LeakFileError(f"the weights before and after an update have other names: {_some(odd)}")
        if odd := [name for name, value in self.gradients.items() if not value.is_floating_point()]:
            raise LeakFileError(f"no real numbers in {_some(odd)}: turn whole or complex ones into real ones")
        if self.is_update and (self.about.lr is None or self.about.steps is None):
            raise LeakFileError("an update needs lr and steps, the learning rate and number of the client's SGD steps")
        for kind in (self.gradients, self.before, self.after):
            if odd := [name for name, value in kind.items() if value.is_floating_point() and value.dtype not in REAL]:
                raise LeakFileError(f"{_some(odd)} in {kind[odd[0]].dtype}, which nothing computes in: use float32")
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
        if self.labels is not None and (self.labels.dtype != torch.int64 or bool((self.labels < 0).any())):
            raise LeakFileError(f"labels must be classes from 0 on, in int64, got {self.labels.tolist()[:3]}")


def save(
    path: str | os.PathLike,
    gradients: nn.Module | Tensors | None = None,
    *,
    before: nn.Module | Tensors | None = None,
    after: nn.Module | Tensors | None = None,
    model: nn.Module | Sequence[str] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    **about,
) -> None:
    """Write what a client sent to `path`, which ends in .safetensors, atomically; a missing folder is made.

    gradients: by parameter name, or the model after backward(), or a list as torch.autograd.grad returns it, with None
    where there is none. Or before and after: state dicts, models, or lists such as Flower sends, around the client's
    SGD steps; what `after` lacks did not change. before, beside gradients: the weights the attacker also knows. model:
    names the tensors of lists, in its order, or these names. about: the fields of `About`; one number as mean or std is
    for all channels. Unscale mixed-precision gradients first. Raises LeakFileError for what no attack could use.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise LeakFileError(f"'{path}': the name of a leak file ends in {SUFFIX}")
    model = next((one for one in (model, gradients, after, before) if isinstance(one, nn.Module)), model)
    shared = _read(gradients, model, "gradients")
    first, last = (_read(given, model, kind) for given, kind in ((before, "weights before"), (after, "weights after")))
    if last and last.keys() < first.keys():
        same = all(value.shape == first[name].shape and (value == first[name]).all() for name, value in last.items())
        last = last if same else first | last  # where nothing else changed, what is missing has rather been forgotten
    for name in first.keys() & last.keys():  # a server may keep more digits than it sends
        dtype = torch.promote_types(first[name].dtype, last[name].dtype)
        first[name], last[name] = first[name].to(dtype), last[name].to(dtype)
    leak = LeakFile(_about(about), shared, first, last, _labels(labels))
    leak.check()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, leak)
    except OSError as error:
        raise LeakFileError(f"cannot write '{path}' ({error.strerror}): choose another place") from error


def write(path: str | os.PathLike, leak: LeakFile) -> None:
    """Write a leak without looking at it; `save` is for users."""
    parts = {"gradient": leak.gradients, "before": leak.before, "after": leak.after}
    tensors = {f"{kind}/{name}": value for kind, part in parts.items() for name, value in part.items()}
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
    """Read and check a leak file. Raises LeakFileError where it is missing, damaged, pickled, too new, or no leak."""
    about = read_about(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("sha256") != _digest(header["leak"], tensors):
        raise LeakFileError(f"leak file '{path}' was changed since it was written: its checksum does not fit")
    parts = (_part(tensors, kind) for kind in ("gradient/", "before/", "after/"))
    leak = LeakFile(about, *parts, tensors.get("labels"))
    try:
        leak.check()
    except LeakFileError as error:
        raise LeakFileError(f"leak file '{path}': {error}") from error
    return leak


def read_about(path: str | os.PathLike) -> About:
    """Return what the header of a leak file says, without reading its tensors. Raises LeakFileError."""
    path = Path(path)
    if not path.is_file():
        raise LeakFileError(f"leak file '{path}' does not exist")
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(PICKLES) and start[8:] != b"{":  # the length of a header, in 8 bytes, may start like a pickle
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
    """Return the SHA-256 of the description and of every tensor's name, type, shape and bytes: against accidents, as
    who forges a file can compute it too."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _read(given: nn.Module | Tensors | None, model: nn.Module | Sequence[str] | None, kind: str) -> dict[str, Tensor]:
    """Return gradients, or the tensors of a state, by name; those that are None left out. Raises LeakFileError."""
    if given is None:
        return {}
    if isinstance(given, nn.Module):
        grads = {name: value.grad for name, value in _inner(given).named_parameters()}
        named = grads if kind == "gradients" else _inner(given).state_dict()
    else:
        named = _named(given, model, kind)
    found = _tensors(named, model)
    own = _inner(model).state_dict() if isinstance(model, nn.Module) else {}
    if odd := [name for name, value in found.items() if name in own and value.shape != own[name].shape]:
        raise LeakFileError(f"the {kind} of {_some(odd)} have other shapes than the model has: give them as is")
    if kind == "gradients":
        if named and not found:
            raise LeakFileError("no parameter has a gradient: save after backward() and before zero_grad()")
        if weights := [name for name, value in named.items() if isinstance(value, nn.Parameter)]:
            raise LeakFileError(f"{_some(weights)} of the gradients are parameters, not gradients: give their .grad")
        if shards := [name for name, value in found.items() if not value.numel() or "_flat_param" in name]:
            raise LeakFileError(f"{_some(shards)} of the gradients are empty or shards: gather them on one process")
    return found


def _named(given: Tensors, model: nn.Module | Sequence[str] | None, kind: str) -> dict:
    """Return what was given as a dict: a mapping, pairs of names and tensors, or a list that `model` names."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, (Tensor, str, bytes)) or not hasattr(given, "__iter__"):
        raise LeakFileError(f"{kind} must be a model, a dict or a list of tensors, not a {type(given).__name__}")
    values = list(given)
    if values and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in values):
        return dict(values)
    if model is None:
        raise LeakFileError(f"the list of {kind} has no names: pass model=, the model it is of, or its names in order")
    orders, shapes = {"names": [] if isinstance(model, nn.Module) else list(model)}, {}
    if isinstance(model, nn.Module):
        state, parameters = _inner(model).state_dict(), dict(_inner(model).named_parameters())
        shapes = {name: tuple(value.shape) for name, value in (state | parameters).items()}
        trained = [name for name, value in parameters.items() if value.requires_grad]
        orders = {"parameters": list(parameters), "trained parameters": trained, "tensors of the state": list(state)}
    same_number = {tuple(names) for names in orders.values() if len(names) == len(values)}
    sizes = [None if value is None else tuple(getattr(value, "shape", ())) for value in values]
    fitting = [names for names in same_number
               if all(None in (size, shapes.get(name)) or size == shapes[name]
                      for name, size in zip(names, sizes, strict=True))]  # fmt: skip
    if len(fitting) != 1:
        listed = ", ".join(f"{len(names)} {what}" for what, names in orders.items())
        raise LeakFileError(f"the list of {kind} has {len(values)} tensors, and other shapes or numbers than: {listed}")
    return dict(zip(fitting.pop(), values, strict=True))


def _tensors(named: Mapping, model: nn.Module | Sequence[str] | None) -> dict[str, Tensor]:
    """Return dense tensors on the CPU under the network's own names, without those of wrappers around it."""
    found = {name: _tensor(name, value) for name, value in named.items() if value is not None}
    own = set(_inner(model).state_dict()) if isinstance(model, nn.Module) else set()
    for part in INSIDE:
        found = {name.replace(part, ""): value for name, value in found.items()}
        own = {name.replace(part, "") for name in own}
    while prefix := next((one for one in WRAPPERS if found and all(name.startswith(one) for name in found)), None):
        if found.keys() <= own:  # it is the network's own attribute
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _tensor(name, value) -> Tensor:
    """Return one tensor, dense and on the CPU, of whatever library. Raises LeakFileError."""
    if not isinstance(name, str):
        raise LeakFileError(f"tensors are named by text, not by {name!r}: pass a dict by parameter name")
    try:
        if not isinstance(value, Tensor):
            value = value.numpy() if callable(getattr(value, "numpy", None)) else value
            value = torch.as_tensor(value.copy() if callable(getattr(value, "copy", None)) else value)
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # of a sharded DTensor
        value = value.detach().dequantize() if value.is_quantized else value.detach()
        return (value if value.layout == torch.strided else value.to_dense()).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"'{name}' is a {type(value).__name__}, not a tensor of numbers ({' '.join(str(error).split())})"
        raise LeakFileError(text) from error


def _inner(model: nn.Module) -> nn.Module:
    """Return the network itself, out of what DistributedDataParallel, torch.compile and the like wrap around it."""
    while (place := WRAPPING.get(type(model).__name__)) and isinstance(getattr(model, place, None), nn.Module):
        model = getattr(model, place)
    return model


def _about(given: dict) -> About:
    """Return the description of a leak from numbers of any library. Raises LeakFileError."""
    about = {key: _plain(value) for key, value in given.items()}
    unknown = sorted(about.keys() - {item.name for item in fields(About)})
    missing = [key for key in ("batch_size", "image_shape") if about.get(key) is None]
    if unknown or missing:
        raise LeakFileError(f"save() {'does not know' if unknown else 'needs'} {_some(unknown or missing)}")
    for key, value in about.items():
        if key in ("mean", "std") and isinstance(value, (int, float)):
            about[key] = (value,) * (about["image_shape"][0] if _numbers(about["image_shape"], 3) else 1)
        elif key in ("batch_size", "steps", "local_batch_size") and isinstance(value, float) and value.is_integer():
            about[key] = int(value)
    found = About(**about)
    if found.mean is not None and not all(0 <= value <= 1 for value in found.mean):
        raise LeakFileError(f"mean of a leak must be from 0 to 1, as of pixels in [0, 1], got {found.mean}")
    return found


def _plain(value):
    """Return Python's numbers and tuples for those of torch and NumPy; a tensor or array of one number is a number."""
    value = value.tolist() if callable(getattr(value, "tolist", None)) else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _labels(given) -> Tensor | None:
    """Return labels (B,) as int64. Raises LeakFileError."""
    if given is None:
        return None
    try:
        found = torch.as_tensor(_plain(given))
        if not (found == found.to(torch.int64)).all():
            raise ValueError("parts of numbers")
        return (found[None] if found.dim() == 0 else found).to(torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LeakFileError(f"labels must be one class number per image, got {given!r:.60}") from error


def _numbers(values, length: int) -> bool:
    listed = values if isinstance(values, (tuple, list)) else ()
    return len(listed) == length and all(isinstance(one, (int, float)) and math.isfinite(one) for one in listed)


def _some(names: Sequence[str]) -> str:
    """Return names for a message: the first three and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in list(names)[:3]) + more


def leak_text(leak: LeakFile) -> str:
    """Return what a leak file holds, as text."""
    lines = [f"{key}: {value}" for key, value in asdict(leak.about).items() if value not in (None, "")]
    lines.append(f"labels: {'not in the file' if leak.labels is None else leak.labels.tolist()}")
    for kind in ("gradients", "before", "after"):
        if tensors := getattr(leak, kind):
            lines.append(f"{kind}: {len(tensors)} tensors, {sum(value.numel() for value in tensors.values())} values")
            lines += [f"  {name} {tuple(value.shape)}" for name, value in tensors.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise LeakFileError("usage: python leak_file.py FILE")
        print(leak_text(load(sys.argv[1])))
    except LeakFileError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
