"""Labelled images on disk, checked before anything runs: which classes there are and that each has images.

Every dataset here is indexable, gives (PIL image, label), and has `classes` (names by label). To add one: one function
(path, split, download) -> dataset, one line in DATASETS.
"""

from pathlib import Path

from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.attributes import attributes
from data.cache import Cache
from data.classes import class_order, read_class_list
from data.decode import image_files, is_litter, read_rgb, to_rgb
from data.shards import Shards
from utils.errors import UserError, did_you_mean, look_up, reason
from utils.files import existing_folder

SPLITS = ("train", "val")


class ImageFolder(tv.ImageFolder):
    """`root/<class>/**/*.jpg` (and png, webp, ...), classes in the order of `class_order`, or those of `class_names`.

    litter: hidden and system files and folders that were passed over.
    """

    def __init__(self, root: Path, class_names: list[str] | None = None):
        self.wanted, self.litter = class_names, []
        existing_folder(root, "image folder")
        super().__init__(str(root), loader=read_rgb, allow_empty=True)
        counts = [0] * len(self.classes)
        for label in self.targets:
            counts[label] += 1
        empty = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if empty:
            hidden = any(Path(path).is_relative_to(root / empty[0]) for path in self.litter)
            beside = " but hidden or system files" if hidden else ""
            raise UserError(
                f"class folder '{root / empty[0]}' holds no images{beside} ({', '.join(IMG_EXTENSIONS)}): "
                "fill or remove it"
            )

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], *_, **__) -> list[tuple[str, int]]:
        """Return (file, label) of every image, classes in sorted order; torchvision's would follow links in circles."""
        names = sorted(class_to_idx)
        found = {name: image_files(Path(directory, name), self.litter) for name in names}
        return [(path, class_to_idx[name]) for name in names for path in found[name]]

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        self.litter += sorted(str(entry) for entry in Path(directory).iterdir() if is_litter(entry.name))
        found = class_order(class_folders(Path(directory)))
        if not found:
            raise UserError(f"'{directory}' has no class folders: expected {directory}/<class>/<image>.jpg")
        absent = [name for name in self.wanted or [] if name not in set(found)]
        if absent:
            raise UserError(f"class '{absent[0]}' is not in '{directory}': {did_you_mean(absent[0], found)}")
        names = self.wanted or found
        return names, {name: label for label, name in enumerate(names)}


def class_folders(folder: Path) -> set[str]:
    """Return the names of the folders in a folder, hidden and system ones left out."""
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and not is_litter(entry.name)}


def image_folder(path: Path, split: str, download: bool = False, classes: str | None = None) -> Dataset:
    """Open `path/train/<class>` and `path/val/<class>`, with the same classes. `classes`: file with one name a
    line."""
    existing_folder(path, "data folder")
    names = read_class_list(classes) if classes else None
    splits = {name: path / name for name in SPLITS if (path / name).is_dir()}
    if split not in splits:
        raise UserError(f"'{path}' has no '{split}' folder: expected {path}/{split}/<class>/<image>.jpg")
    if names is None and len(splits) == 2:
        train, val = (class_folders(folder) for folder in splits.values())
        if train != val:
            odd = sorted(train ^ val)[0]
            where, missing = ("train", "val") if odd in train else ("val", "train")
            raise UserError(
                f"train and val of '{path}' have different classes ({len(train ^ val)} differ): "
                f"'{odd}' is in {where} but not in {missing}"
            )
    return ImageFolder(splits[split], names)


class DomainNet(Dataset):
    """One domain of DomainNet in its published layout: `<domain>/<class>/*.jpg` and `<domain>_{train,test}.txt`."""

    def __init__(self, path: Path, split: str):
        domain = path.name
        listing = path.parent / f"{domain}_{'train' if split == 'train' else 'test'}.txt"
        existing_folder(path, "DomainNet domain")
        if not listing.is_file():
            raise UserError(f"DomainNet split list '{listing}' does not exist: it is published beside {domain}.zip")
        rows = [line.rsplit(maxsplit=1) for line in listing.read_text(errors="replace").splitlines() if line.strip()]
        if odd := [row for row in rows if len(row) != 2 or not row[1].isdecimal()]:
            raise UserError(f"line '{' '.join(odd[0])}' of '{listing}' is not an image and a label: get it again")
        self.samples = [(str(path.parent / name), int(label)) for name, label in rows]
        if not rows:
            raise UserError(f"DomainNet split list '{listing}' is empty: get it again")
        names = {label: Path(name).parent.name for name, label in self.samples}
        self.classes = [names.get(label, str(label)) for label in range(max(names) + 1)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return read_rgb(path), label


def domainnet(path: Path, split: str, download: bool = False) -> Dataset:
    """Open a domain: `path` names its folder, e.g. datasets/domainnet/clipart."""
    return DomainNet(path, split)


def cifar10(path: Path, split: str, download: bool = False) -> Dataset:
    """Return CIFAR-10 in its published form (data batches); for an image folder use 'folder'."""
    return tv.CIFAR10(str(path), train=split == "train", download=download)


def cifar100(path: Path, split: str, download: bool = False) -> Dataset:
    """Return CIFAR-100 in its published form."""
    return tv.CIFAR100(str(path), train=split == "train", download=download)


def svhn(path: Path, split: str, download: bool = False) -> Dataset:
    """Return Street View House Numbers, cropped digits; val is the published test split."""
    dataset = tv.SVHN(str(path), split="train" if split == "train" else "test", download=download)
    dataset.classes = [str(digit) for digit in range(10)]
    return dataset


def flowers102(path: Path, split: str, download: bool = False) -> Dataset:
    """Return Oxford Flowers-102: train is the published train + val (2,040 images), val the published test (6,149)."""
    parts = ["train", "val"] if split == "train" else ["test"]
    dataset = ConcatDataset([tv.Flowers102(str(path), split=part, download=download) for part in parts])
    dataset.classes = [str(label) for label in range(102)]
    return dataset


def mnist(path: Path, split: str, download: bool = False) -> Dataset:
    """Return MNIST in its published form; val is the published test split."""
    return tv.MNIST(str(path), train=split == "train", download=download, transform=to_rgb)


def fashion_mnist(path: Path, split: str, download: bool = False) -> Dataset:
    """Return Fashion-MNIST in its published form; val is the published test split."""
    return tv.FashionMNIST(str(path), train=split == "train", download=download, transform=to_rgb)


def shards(path: Path, split: str, download: bool = False, classes: str | None = None) -> Dataset:
    """Open tar shards in WebDataset's layout: `path/train/*.tar` and `path/val/*.tar`."""
    return Shards(path, split, read_class_list(classes) if classes else None)


def cache(path: Path, split: str, download: bool = False, classes: str | None = None) -> Dataset:
    """Open decoded pixels: `path/train.npy` and `path/val.npy`."""
    return Cache(path, split, read_class_list(classes) if classes else None)


DATASETS = {
    "folder": image_folder,
    "shards": shards,
    "cache": cache,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "flowers102": flowers102,
    "domainnet": domainnet,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "attributes": attributes,
}


def open_dataset(
    name: str, path: str | None, split: str, *, download: bool = False, classes: str | None = None
) -> Dataset:
    """Return the `split` ('train' or 'val') of a dataset. Raises UserError naming the folder or class that is wrong."""
    build = look_up(DATASETS, name, "dataset")
    if path is None:
        raise UserError("--data.path is missing: the folder that holds the dataset")
    if classes and name not in ("folder", "shards", "cache"):
        raise UserError(f"--data.classes selects class folders and does not apply to dataset '{name}'")
    try:
        return build(Path(path), split, download, **({"classes": classes} if classes else {}))
    except (RuntimeError, OSError) as error:  # torchvision: files absent, damaged or not writable
        raise UserError(f"dataset '{name}' at '{path}': {reason(error)} (--data.download true)") from error


def describe_sample(dataset: Dataset, index: int) -> str:
    """Return where sample `index` comes from: its file, or its place in the dataset."""
    if hasattr(dataset, "place_of"):
        return dataset.place_of(index)
    samples = getattr(dataset, "samples", None)
    return samples[index][0] if samples else f"{type(dataset).__name__} sample {index}"
