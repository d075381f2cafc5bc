"""A folder of images without labels: what an attack campaign reads."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.classes import class_order
from data.decode import UNREADABLE, image_files, read_rgb
from data.transforms import eval_transform
from utils.errors import UserError, reason
from utils.files import existing_folder
from utils.progress import track

SPLITS = ("train", "val")


def list_images(
    sources: str | Path | Sequence[str | Path],
    count: int | None = None,
    litter: list[str] | None = None,
    index: Sequence[int] | None = None,
) -> list[Path]:
    """Return image files: those below a folder in sorted order, or of several files and folders, one after the other.

    count: only that many, spread evenly over them. index: only these, counted from 0. litter: gets the hidden and
    system files and folders that were passed over. Raises UserError for paths that do not exist, folders without
    images, and more images than there are.
    """
    sources, litter = as_sources(sources), [] if litter is None else litter
    paths = list(dict.fromkeys(path for source in sources for path in _images_of(source, litter)))
    said = f"'{sources[0]}'" if len(sources) == 1 else f"{len(sources)} paths"
    if index is not None:
        if wrong := [place for place in index if place >= len(paths)]:
            raise UserError(f"--index {wrong[0]}: {said} holds {len(paths)} images, counted from 0: choose a lower one")
        return [paths[place] for place in index]
    if count is None:
        return paths
    if count > len(paths):
        raise UserError(f"--num_images {count}: {said} holds only {len(paths)} images")
    return [paths[index * len(paths) // count] for index in range(count)]


def as_sources(sources: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one path, or several, as a list."""
    return [Path(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]


def _images_of(source: Path, litter: list[str]) -> list[Path]:
    """Return the images below a folder, or the one file."""
    if source.is_file():
        return [source]
    paths = sorted(map(Path, image_files(existing_folder(source, "image folder"), litter)))
    if not paths:
        beside = " but hidden or system files" if litter else ""
        raise UserError(f"image folder '{source}' holds no images{beside} ({', '.join(IMG_EXTENSIONS)})")
    return paths


def check_images(paths: Sequence[Path], log: Callable[[str], None] | None = None) -> None:
    """Read every file once. Raises UserError naming the first that cannot be: better now than after days."""
    for path in track(paths, len(paths), "checking images", log):
        _read(path)


def _read(path: Path) -> Image.Image:
    try:
        return read_rgb(path)
    except UNREADABLE as error:
        raise UserError(f"cannot read image '{path}' ({reason(error)}): replace or remove it") from error


def class_of(path: Path, root: str | Path) -> str:
    """Return the name of the class folder of an image below `root`: the first folder on the way to it, or after `train`
    or `val`, as the data sets of data/folders.py have it; the name of `root` where it lies right in it. Where `root` is
    the image itself, the name of the folder it lies in."""
    root = path.parent if Path(root) == path else root
    parts = path.relative_to(root).parts[:-1]
    parts = parts[1:] if len(parts) > 1 and parts[0] in SPLITS else parts
    return parts[0] if parts else Path(root).resolve().name


def class_folders(folder: str | Path) -> list[str]:
    """Return the class folders of the images below `folder`, in the order of their labels if they have one."""
    return class_order({class_of(path, folder) for path in list_images(folder)})


def read_images(paths: list[Path], image_size: int, mean, std) -> Tensor:
    """Normalised (B, 3, S, S): resized and centre-cropped as in evaluation, unless the file has that size already.

    Raises UserError naming a file that cannot be read.
    """
    fit, keep = (eval_transform(image_size, mean=mean, std=std, crop=crop) for crop in (True, False))
    images = []
    for path in paths:
        image = _read(path)
        images.append((keep if image.size == (image_size, image_size) else fit)(image))
    return torch.stack(images)
