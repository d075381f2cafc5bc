"""Images with attributes, each of which is there or not: a CSV file a split, as CelebA's list is published.

The header names the attributes behind the first column, which holds the image's path relative to the file; values are
1 and 0, or 1 and -1.
"""

import csv
from pathlib import Path

from torch.utils.data import Dataset

from data.decode import read_rgb
from utils.errors import UserError

VALUES = {"1": 1, "0": 0, "-1": 0}


def read_attributes(file: Path) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """Return the names of the attributes, and (path of the image, 0 or 1 for each attribute) of every row.

    Raises UserError naming the line that is wrong.
    """
    if not file.is_file():
        raise UserError(f"attribute file '{file}' does not exist: a header of names, then image,1,0,... a line")
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            rows = [row for row in csv.reader(opened) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"attribute file '{file}' is not CSV text ({error}): save it as CSV in UTF-8") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UserError(f"attribute file '{file}' needs a header of names and a line for each image")
    names, samples = [name.strip() for name in rows[0][1:]], []
    if len(set(names)) < len(names):
        raise UserError(f"attribute file '{file}' names an attribute twice in its header: rename one")
    for number, row in enumerate(rows[1:], start=2):
        values = [VALUES.get(value.strip()) for value in row[1:]]
        if len(values) != len(names) or None in values:
            raise UserError(f"line {number} of '{file}' must be an image and {len(names)} values of 1 and 0 (or -1)")
        samples.append((str(file.parent / row[0].strip()), values))
    return names, samples


class Attributes(Dataset):
    """Pairs (PIL image, [0 or 1 for each attribute]); `classes`: the names of the attributes."""

    multi_label = True

    def __init__(self, file: Path):
        self.classes, self.samples = read_attributes(file)
        self.root = file.parent

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, values = self.samples[index]
        return read_rgb(path), values


def attributes(path: Path, split: str, download: bool = False) -> Attributes:
    """Return the `split` of a folder: `path/train.csv` or `path/val.csv`, whose headers must agree."""
    found = Attributes(path / f"{split}.csv")
    other = path / ("val.csv" if split == "train" else "train.csv")
    if other.is_file() and (names := read_attributes(other)[0]) != found.classes:
        odd = next((one for one in names if one not in found.classes), names[0])
        raise UserError(f"train.csv and val.csv of '{path}' have different headers ('{odd}'): give both the same")
    return found
