"""Checkpoint files as a stranger may have made them: what they declare is checked before memory is given to it."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError, reason

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DECLARED = 4  # bytes of tensors a file may declare for each of its own: tied weights are stored once


def check_size(path: Path) -> None:
    """Raise ValueError for a zip archive that unpacks to more than its own size: torch.save compresses nothing."""
    if zipfile.is_zipfile(path):  # the format before torch 1.6 and safetensors are not
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked} bytes")


def check_bytes(path: Path) -> None:
    """Raise ValueError where the bytes of an archive changed after it was written, which torch's reader overlooks."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"'{damaged}' in it has changed since it was written")


def check_declared(content: object, path: Path) -> None:
    """Raise ValueError when the tensors in `content` claim far more bytes than the file has: views of a few values."""
    declared = sum(value.numel() * value.element_size() for value in tensors(content))
    if declared > DECLARED * path.stat().st_size:
        raise ValueError(f"it declares {declared} bytes of tensors and has {path.stat().st_size}")


def tensors(content: object) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    left, seen = [content], set()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            left += item
        elif isinstance(item, dict):
            left += item.values()


def check_description(content: Mapping, weights: Mapping, path: str | Path) -> None:
    """Raise UserError unless what our file says of its model is of the right kind, and no deeper than its weights."""
    arguments, normalize, classes = (content.get(key) for key in ("arguments", "normalize", "classes"))
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise UserError(f"checkpoint '{path}' does not say which model it is of ('arguments'); use another file")
    depths = [arguments.get("depth") or 0, *(arguments.get("depths") or ())]
    if not all(isinstance(depth, int) for depth in depths) or sum(depths) > len(weights):
        raise UserError(f"checkpoint '{path}' is of a model of depth {depths} and has {len(weights)} tensors of it")
    if normalize is not None and not (
        isinstance(normalize, dict)
        and normalize.keys() == {"mean", "std"}
        and all(_numbers(values) for values in normalize.values())
        and all(value > 0 for value in normalize["std"])
    ):
        raise UserError(f"checkpoint '{path}' has a 'normalize' that is not a mean and a positive std per channel")
    if (loss := content.get("loss", "cross_entropy")) not in ("cross_entropy", "bce"):
        raise UserError(f"checkpoint '{path}' has the loss '{loss}', which is not known here; use another file")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise UserError(f"checkpoint '{path}' has 'classes' that are not a list of names")


def _numbers(values: object) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) in (1, 3)
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def check_numbers(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError naming a tensor that holds no weights where the model has some: integers, NaN, complex numbers.

    own: the model's tensors by the same names. 16-bit and 64-bit numbers are weights, and converted when loaded.
    """
    for name, value in weights.items():
        if name not in own or not own[name].is_floating_point():
            continue
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_complex():
            raise UserError(f"'{name}' of checkpoint '{path}' holds {kind} numbers: convert it to real ones")
        if value.dtype not in FLOATS:
            kind = f"holds {kind} numbers, as quantised weights do"
            raise UserError(f"'{name}' of checkpoint '{path}' {kind}: use the model before quantisation")
        if value.layout != torch.strided:
            raise UserError(f"'{name}' of checkpoint '{path}' is stored sparse: save it with to_dense()")
        if not value.isfinite().all():
            raise UserError(
                f"'{name}' of checkpoint '{path}' is NaN or infinite: its weights are damaged, use an earlier one"
            )


@contextmanager
def odd_contents(path: str | Path) -> Iterator[None]:
    """Turn whatever weights of odd kinds and shapes provoke inside the block into a UserError."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"checkpoint '{path}': {error}") from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"checkpoint '{path}' has weights of an unknown kind ({reason(error)}); use another") from error
