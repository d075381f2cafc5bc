"""Image sets decoded once, as arrays of pixels on disk that are mapped into memory: for sets of small images.

    FOLDER/{train,val}.npy uint8 (N, S, S, 3)   FOLDER/{train,val}_labels.npy int64 (N,)   FOLDER/classes.txt

Plain NumPy files; scripts/prepare_shards.py --cache SIDE writes them. Loader processes share the pages of the system's
cache, and nothing is decoded.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data.classes import choose_classes, packed_classes
from utils.errors import UserError, reason
from utils.files import existing_file, existing_folder


class Cache(Dataset):
    """One split of a cached set. Gives (PIL image, label)."""

    def __init__(self, folder: Path, split: str, wanted: Sequence[str] | None = None):
        existing_folder(folder, "data folder")
        splits = [name for name in ("train", "val") if (folder / f"{name}.npy").is_file()]
        if split not in splits:
            raise UserError(f"'{folder}' has no {split}.npy: make it with scripts/prepare_shards.py --cache SIDE")
        labels = {name: open_labels(folder, name) for name in splits}
        names = packed_classes(folder, max(int(values.max()) for values in labels.values()))
        self.path = folder / f"{split}.npy"
        self.pixels = open_pixels(self.path)
        if len(self.pixels) != len(labels[split]):
            counts = f"{len(self.pixels)} images and {len(labels[split])} labels"
            raise UserError(f"'{self.path}' has {counts}: make the cache anew")
        self.places, self.labels, self.classes = choose_classes(labels[split], names, wanted, folder)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[self.places[number]]), int(self.labels[number])

    def place_of(self, number: int) -> str:
        return f"{self.path}: image {self.places[number]}"

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "pixels"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, pixels=open_pixels(state["path"]))  # mapped again, not copied


def open_pixels(path: Path) -> np.ndarray:
    pixels = _load(path, "r")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (pixels.shape[1],) * 2 + (3,):
        raise UserError(f"'{path}' holds {pixels.dtype} {pixels.shape}, not uint8 (N, S, S, 3): make the cache anew")
    return pixels


def open_labels(folder: Path, split: str) -> np.ndarray:
    path = existing_file(folder / f"{split}_labels.npy", "list of labels")
    labels = _load(path, None)
    if labels.dtype != np.int64 or labels.ndim != 1 or not len(labels) or labels.min() < 0:
        raise UserError(f"'{path}' does not hold int64 labels (N,) from 0 on: make the cache anew")
    return labels


def _load(path: Path, mode: str | None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"cannot read '{path}' ({reason(error)}): copy it again, or make the cache anew") from error
