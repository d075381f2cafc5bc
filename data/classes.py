"""Lists of class names, and the choice of some classes of a set that is packed."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, did_you_mean
from utils.files import existing_file

CLASSES = "classes.txt"  # of a packed set: a name a line, by label


def as_numbers(names: Collection[str]) -> list[int] | None:
    """Return the numbers that all names are (3, 003), or None where one is no plain number or two are the same."""
    if not names or not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else None


def class_order(names: Collection[str]) -> list[str]:
    """Return class names in the order of their labels: by value where all are numbers (2 before 11), else sorted."""
    return sorted(names, key=str if as_numbers(names) is None else int)


def read_class_list(path: str) -> list[str]:
    """Return class names, one a line; blank lines and lines starting with # are skipped."""
    text = existing_file(path, "class list").read_text(errors="replace").splitlines()
    lines = [line.split()[0] for line in text if line.strip() and not line.startswith("#")]
    if not lines or len(set(lines)) != len(lines):
        raise UserError(f"class list '{path}' is {'empty' if not lines else 'not a list of distinct names'}")
    return lines


def packed_classes(folder: Path, largest: int) -> list[str]:
    """Return the names of the classes of a packed set by label, '0', '1', ... where it does not say."""
    path = folder / CLASSES
    if not path.is_file():
        return [str(label) for label in range(largest + 1)]
    names = path.read_text(errors="replace").removesuffix("\n").split("\n")
    if len(set(names)) != len(names):
        raise UserError(f"'{path}' is not a list of distinct names, one a line: copy it again")
    if largest >= len(names):
        raise UserError(f"'{path}' names {len(names)} classes, but label {largest} is used: copy it again")
    return names


def choose_classes(
    labels: np.ndarray, names: Sequence[str], wanted: Sequence[str] | None, folder: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return (places, labels, names) of the images of the `wanted` classes, whose labels then count in that order."""
    if wanted is None:
        return np.arange(len(labels)), labels, list(names)
    if absent := [name for name in wanted if name not in set(names)]:
        raise UserError(f"class '{absent[0]}' is not in '{folder}': {did_you_mean(absent[0], names)}")
    new = np.full(len(names), -1)
    new[[names.index(name) for name in wanted]] = np.arange(len(wanted))
    places = np.flatnonzero(new[labels] >= 0)
    return places, new[labels[places]], list(wanted)
