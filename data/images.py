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
    size: int = 1,
    by: str = "listing",
) -> list[Path]:
    """Return image files: those below a folder in sorted order, or of several files and folders, one after the other.

    count: only that many, spread evenly over them. index: only these, counted from 0. size, by: in the order of
    `partition`; count then takes whole clients. litter: gets the hidden and system files and folders that were passed
    over. Raises UserError for paths that do not exist, folders without images, and more images than there are.
    """
    sources, litter = as_sources(sources), [] if litter is None else litter
    paths = list(dict.fromkeys(path for source in sources for path in _images_of(source, litter)))
    said = f"'{sources[0]}'" if len(sources) == 1 else f"{len(sources)} paths"
    if index is not None:
        if wrong := [place for place in index if place >= len(paths)]:
            raise UserError(f"--index {wrong[0]}: {said} holds {len(paths)} images, counted from 0: choose a lower one")
        paths = [paths[place] for place in index]
    paths = partition(paths, size, by)
    if count is None or index is not None:
        return paths
    if count > len(paths):
        kind = "" if by == "listing" else f" for --partition {by}"
        raise UserError(f"--num_images {count}: {said} holds only {len(paths)} images{kind}")
    size = 1 if by == "listing" else size
    clients, wanted = len(paths) // size, -(-count // size)
    firsts = [place * clients // wanted * size for place in range(wanted)]
    return [path for first in firsts for path in paths[first : first + size]]


def partition(paths: Sequence[Path], size: int, by: str) -> list[Path]:
    """Return images in the order in which clients take `size` of them each.

    by: 'listing', as they stand; 'class', so that all images of a client are of one folder; 'classes', so that they
    are of `size` different ones, those with most images left first. Images with which no client of that kind can be
    filled are left out. Raises UserError where there is not a single such client.
    """
    if by == "listing":
        return list(paths)
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    left, taken = list(folders.values()), []
    if by == "class":
        taken = [path for own in left for path in own[: len(own) // size * size]]
    while by == "classes" and len(left) >= size:
        left.sort(key=len, reverse=True)  # stable: equal ones stay in the order of the listing
        taken += [own.pop(0) for own in left[:size]]
        left = [own for own in left if own]
    if not taken:
        most = max(map(len, folders.values()))
        held = f"a folder holds at most {most}" if by == "class" else f"there are {len(folders)} folders"
        kind = "one class" if by == "class" else "different classes"
        raise UserError(f"--partition {by}: a client takes {size} images of {kind}, and {held}: lower --batch_size")
    return taken


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
    """Return normalised (B, 3, S, S): resized and centre-cropped as in evaluation, unless the file has that size
    already.

    Raises UserError naming a file that cannot be read.
    """
    fit, keep = (eval_transform(image_size, mean=mean, std=std, crop=crop) for crop in (True, False))
    images = []
    for path in paths:
        image = _read(path)
        images.append((keep if image.size == (image_size, image_size) else fit)(image))
    return torch.stack(images)
