"""A folder of images without labels: what an attack campaign reads."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.loaders import UNREADABLE
from data.transforms import eval_transform
from utils.errors import UserError
from utils.files import existing_folder


def list_images(folder: str | Path, count: int | None = None) -> list[Path]:
    """Image files below `folder` in sorted order; with `count`, that many spread evenly over them."""
    root = existing_folder(folder, "image folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not paths:
        raise UserError(f"image folder '{folder}' holds no images ({', '.join(IMG_EXTENSIONS)})")
    if count is None:
        return paths
    if count > len(paths):
        raise UserError(f"--num_images {count}: '{folder}' holds only {len(paths)} images")
    return [paths[index * len(paths) // count] for index in range(count)]


def read_images(paths: list[Path], image_size: int, mean, std, crop: bool = True) -> Tensor:
    """Normalised (B, 3, S, S) after the evaluation transform. Raises UserError naming a file that cannot be read."""
    transform = eval_transform(image_size, mean=mean, std=std, crop=crop)
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
        except UNREADABLE as error:
            raise UserError(
                f"cannot read image '{path}' ({str(error).splitlines()[0][:120]}): replace or remove it"
            ) from error
    return torch.stack(images)
