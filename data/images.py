"""A folder of images without labels: what an attack campaign reads."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.decode import UNREADABLE, image_files, read_rgb
from data.transforms import eval_transform
from utils.errors import UserError, reason
from utils.files import existing_folder
from utils.progress import track


def list_images(folder: str | Path, count: int | None = None) -> list[Path]:
    """Image files below `folder` in sorted order; with `count`, that many spread evenly over them."""
    root = existing_folder(folder, "image folder")
    paths = sorted(map(Path, image_files(root)))
    if not paths:
        raise UserError(f"image folder '{folder}' holds no images ({', '.join(IMG_EXTENSIONS)})")
    if count is None:
        return paths
    if count > len(paths):
        raise UserError(f"--num_images {count}: '{folder}' holds only {len(paths)} images")
    return [paths[index * len(paths) // count] for index in range(count)]


def check_images(paths: Sequence[Path], log: Callable[[str], None] | None = None) -> None:
    """Read every file once. Raises UserError naming the first that cannot be: better now than after days."""
    for path in track(paths, len(paths), "checking images", log):
        _read(path)


def _read(path: Path) -> Image.Image:
    try:
        return read_rgb(path)
    except UNREADABLE as error:
        raise UserError(f"cannot read image '{path}' ({reason(error)}): replace or remove it") from error


def class_folders(folder: str | Path) -> list[str]:
    """Names of the folders that hold the images below `folder`, sorted: its classes, if it has several."""
    return sorted({path.parent.name for path in list_images(folder)})


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
