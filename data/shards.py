"""Image sets packed into tar files, in the layout of WebDataset: `KEY.jpg` (or .png, ...) and `KEY.cls`, its label.

    FOLDER/train/*.tar  FOLDER/val/*.tar  FOLDER/classes.txt (a name a line, by label; may be absent)

A cluster's file system then opens hundreds of files instead of millions. Images are read where they lie, by offset, so
they come in any order: sets, shuffles and resumes are those of the image folder. The offsets are kept in `index.npz`
beside the tars: scripts/prepare_shards.py writes it, and for tars that others made the first reader does. Encoded
images pass the guards of data.decode.
"""

import io
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.classes import choose_classes, packed_classes
from data.decode import is_litter, to_rgb
from utils.errors import UserError, reason
from utils.files import existing_folder, write_atomic

INDEX = "index.npz"
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # a key reaches to the first dot of the file's name
LARGEST_LABEL = 999_999
LARGEST_IMAGE = 1 << 28  # bytes of a file; Pillow refuses images of more than 178 million pixels anyway
OPEN_FILES = 64  # per process


class Index(NamedTuple):
    """shards: file names; sizes: theirs in bytes; per image: which shard, where in it, how many bytes, label."""

    shards: np.ndarray
    sizes: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray


class Shards(Dataset):
    """One split of a packed set. Gives (PIL image, label); `place_of` names shard and member."""

    def __init__(self, folder: Path, split: str, wanted: Sequence[str] | None = None):
        existing_folder(folder, "data folder")
        splits = {name: folder / name for name in ("train", "val") if (folder / name).is_dir()}
        if split not in splits:
            raise UserError(f"'{folder}' has no '{split}' folder: expected {folder}/{split}/*.tar")
        found = {name: open_index(path) for name, path in splits.items()}
        names = packed_classes(folder, max(int(index.label.max()) for index in found.values()))
        self.folder, self.index = splits[split], found[split]
        self.places, self.labels, self.classes = choose_classes(self.index.label, names, wanted, folder)
        self.files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        with Image.open(io.BytesIO(self.encoded(number))) as image:
            return to_rgb(image), int(self.labels[number])

    def encoded(self, number: int) -> bytes:
        """Return the image file as it was packed."""
        place = self.places[number]
        length = int(self.index.length[place])
        if length > LARGEST_IMAGE:
            raise OSError(f"{length:,} bytes are too many for an image")
        data = os.pread(self._file(int(self.index.shard[place])), length, int(self.index.offset[place]))
        if len(data) < length:
            raise OSError("the shard is cut short")
        return data

    def place_of(self, number: int) -> str:
        place = self.places[number]
        shard, offset = self.folder / self.index.shards[self.index.shard[place]], self.index.offset[place]
        names = {where: name for where, _, _, name in images_of(shard)}  # not in the index: rarely asked for
        return f"{shard}: {names.get(offset, f'byte {offset}')}"

    def _file(self, shard: int) -> int:
        if shard not in self.files:
            if len(self.files) == OPEN_FILES:
                os.close(self.files.pop(next(iter(self.files))))
            self.files[shard] = os.open(self.folder / self.index.shards[shard], os.O_RDONLY)
        return self.files[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": {}}

    def __del__(self):
        for file in getattr(self, "files", {}).values():
            os.close(file)


def open_index(folder: Path) -> Index:
    """Return the index of the tars in a folder: the one beside them, or a new one, which is kept there if it can be.

    Raises UserError naming what is wrong with a tar, or with the index.
    """
    shards = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not shards:
        raise UserError(f"'{folder}' holds no shards (*.tar): make them with scripts/prepare_shards.py")
    path = folder / INDEX
    if path.exists():
        index = read_index(path)
        sizes = {shard.name: shard.stat().st_size for shard in shards}
        expected = dict(zip(index.shards.tolist(), index.sizes.tolist(), strict=True))
        if odd := sorted(sizes.items() ^ expected.items()):
            name = odd[0][0]
            has, should = (f"{where[name]:,} bytes" if name in where else "absent" for where in (sizes, expected))
            problem = f"shard '{folder / name}' is {has} and {should} in {INDEX}"
            raise UserError(f"{problem}: copy the shard again, or remove '{path}' if it is the index that is old")
        return index
    index = scan(shards)
    with suppress(OSError):  # in a folder one may only read, the index lives as long as the process
        write_atomic(path, lambda file: np.savez(file, **index._asdict()))
    return index


def read_index(path: Path) -> Index:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if sum(entry.file_size for entry in arrays.zip.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size")
            index = Index(*(arrays[name] for name in Index._fields))
        ends, per_image = index.offset + index.length, index[2:]
        whole = len({len(values) for values in per_image}) == 1 and len(index.label) > 0
        if not whole or min(values.min() for values in per_image) < 0 or (ends > index.sizes[index.shard]).any():
            raise ValueError("its numbers do not fit together")
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds on damaged files
        raise UserError(f"cannot read '{path}' ({reason(error)}): remove it, it is made anew") from error
    return index


def scan(shards: Sequence[Path]) -> Index:
    """Index the images of tars, in the order in which they lie there."""
    rows: list[tuple[int, int, int, int]] = []
    for number, shard in enumerate(shards):
        rows += [(number, *row[:3]) for row in images_of(shard)]
    if not rows:
        raise UserError(f"the shards in '{shards[0].parent}' hold no images (KEY.jpg and KEY.cls)")
    names, sizes = ([shard.name for shard in shards], [shard.stat().st_size for shard in shards])
    return Index(np.array(names), np.array(sizes), *np.array(rows).T.copy())


def images_of(shard: Path) -> list[tuple[int, int, int, str]]:
    """Return (offset, length, label, member) of every image of a tar. Raises UserError naming the shard and the
    member."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                match = MEMBER.fullmatch(member.name)
                if match is None or member.isdir() or any(map(is_litter, member.name.split("/"))):
                    continue
                key, kind = match[1], match[2].lower()
                kind = "image" if f".{kind}" in IMG_EXTENSIONS else kind
                if kind not in ("image", "cls"):
                    continue
                if not member.isreg() or member.issparse():
                    raise _wrong(shard, member.name, "is not a plain file")
                if kind in samples.setdefault(key, {}):
                    raise _wrong(shard, member.name, f"is a second {kind} of '{key}'")
                samples[key][kind] = member
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive marker")
            rows = []
            for parts in samples.values():
                if absent := {"image", "cls"} - parts.keys():
                    missing = "label (.cls)" if "cls" in absent else "image"
                    raise _wrong(shard, next(iter(parts.values())).name, f"has no {missing} beside it")
                image, label = parts["image"], _label(file, parts["cls"], shard)
                rows.append((image.offset_data, image.size, label, image.name))
            return rows
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = f"shard '{shard}' is damaged, cut short or compressed ({reason(error)})"
        raise UserError(f"{problem}: copy it again") from error


def _label(file, member: tarfile.TarInfo, shard: Path) -> int:
    file.seek(member.offset_data)
    text = file.read(min(member.size, 32)).decode(errors="replace").strip()
    if not text.isascii() or not text.isdecimal() or int(text) > LARGEST_LABEL:
        raise _wrong(shard, member.name, f"is {text!r}, not a class number from 0 to {LARGEST_LABEL}")
    return int(text)


def _wrong(shard: Path, member: str, what: str) -> UserError:
    return UserError(f"member '{member}' of shard '{shard}' {what}: mend it or make the shard anew")
