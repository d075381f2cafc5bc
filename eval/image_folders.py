"""Two folders of images scored pair by pair: what `python -m eval.mse`, psnr_ssim, fft2d and lpips share."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import UNREADABLE, open_image
from data.images import list_images
from utils.distributed import pick_device
from utils.errors import UserError, reason
from utils.files import existing_folder, write_json
from utils.progress import track
from utils.statistics import finite, summarize
from utils.tool_parser import ToolParser

BATCH = 16  # pairs read and scored at once
IMAGES = """\
Images are paired by their name, extension and subfolders included; other files are passed over. They are read as RGB
in [0, 1]. Greyscale becomes three equal channels. What is transparent shows white. 16-bit PNGs keep their 16 bits.
Floating-point TIFFs must lie in [0, 1]. Orientation tags are not applied.
"""


class FolderMetric(NamedTuple):
    """A score of two image batches in [0, 1], one value per image, and its unit and direction in words."""

    function: Callable[[Tensor, Tensor], Tensor]
    meaning: str


def command_line(name: str, description: str) -> ToolParser:
    """Return the options of `python -m eval.NAME`."""
    parser = ToolParser(
        prog=f"python -m eval.{name}",
        description=description,
        epilog=IMAGES,
    )
    add = partial(parser.add_argument, type=Path, metavar="DIR", required=True)
    add("--source_dir", help="folder of images, such as the reconstructions of an attack")
    add("--target_dir", help="folder of the images they are compared with, such as the originals")
    add("--json", required=False, metavar="FILE", help="write mean, std, n and the value of every image to this file")
    parser.add_argument(
        "--allow_missing", action="store_true", help="score the names both folders share and pass over the others"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: %(default)s)")
    return parser


def score_folders(args: Namespace, metrics: dict[str, FolderMetric]) -> None:
    """Score every pair, print one line per metric and write --json.

    JSON: {metric: {"mean", "std", "n"}, "per_image": [{"image", metric...}], "missing"}. The mean leaves out infinite
    (counted as "infinite") and undefined values, which are null per image; std is the sample standard deviation.
    """
    device = pick_device(args.device)
    if args.json:
        existing_folder(args.json.absolute().parent, "--json: folder")
    names, missing = shared_names(args.source_dir, args.target_dir, args.allow_missing)
    log = partial(print, file=sys.stderr, flush=True)
    rows = []
    for batch, source, target in read_pairs(args.source_dir, args.target_dir, track(names, len(names), "pairs", log)):
        source, target = source.to(device), target.to(device)
        try:
            columns = {key: metric.function(source, target).tolist() for key, metric in metrics.items()}
        except UserError as error:
            raise UserError(f"'{args.source_dir / batch[0]}': {error}") from error
        rows += [
            {"image": name, **dict(zip(columns, row, strict=True))}
            for name, row in zip(batch, zip(*columns.values(), strict=True), strict=True)
        ]
    summary = summarize(rows, list(metrics))
    for key, metric in metrics.items():
        print(_line(key, summary[key], len(rows), metric.meaning))
    if missing:
        print(f"{missing} images without a partner were passed over")
    if args.json:
        write_json(args.json, {**summary, "per_image": [finite(row) for row in rows], "missing": missing})


def _line(name: str, row: dict, total: int, meaning: str) -> str:
    """Return one metric as text."""
    perfect = row.get("infinite", 0)
    undefined = total - row["n"] - perfect
    notes = [f"{row['n']} pairs", meaning]
    notes += [f"{perfect} equal pairs (infinite) not in the mean"] * bool(perfect)
    notes += [f"{undefined} undefined not in the mean"] * bool(undefined)
    if row["mean"] is None:
        value = "infinite" if perfect else "undefined"
    else:
        value = f"{row['mean']:.6g}" + (f" ± {row['std']:.3g}" if row["std"] is not None else "")
    return f"{name}: {value} ({'; '.join(notes)})"


def shared_names(source: Path, target: Path, allow_missing: bool = False) -> tuple[list[str], int]:
    """Return (sorted names that both folders have, number of images with a name that only one has).

    Raises UserError for a missing or empty folder, no common name and, unless allowed, for an image without a partner.
    """
    ours, theirs = (
        {path.relative_to(folder).as_posix() for path in list_images(existing_folder(folder, "image folder"))}
        for folder in (source, target)
    )
    if not ours & theirs:
        raise UserError(f"'{source}' and '{target}' have no image name in common (extensions count): rename one side")
    for alone, folder, other in ((ours - theirs, source, target), (theirs - ours, target, source)):
        if alone and not allow_missing:
            raise UserError(
                f"{len(alone)} images of '{folder}' have no partner in '{other}', the first is '{min(alone)}': "
                "add it, or pass --allow_missing to score the others"
            )
    return sorted(ours & theirs), len(ours ^ theirs)


def read_pairs(source: Path, target: Path, names: Iterable[str]) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Return batches (names, (B, 3, H, W), (B, 3, H, W)) of up to 16 consecutive pairs of one size, read as they are
    needed.

    Raises UserError naming a pair whose sizes differ.
    """
    batch: list[tuple[str, Tensor, Tensor]] = []
    for name in names:
        pair = read_image(source / name), read_image(target / name)
        if pair[0].shape != pair[1].shape:
            (_, *ours), (_, *theirs) = pair[0].shape, pair[1].shape
            raise UserError(
                f"'{source / name}' has {ours[1]} x {ours[0]} pixels but '{target / name}' {theirs[1]} x {theirs[0]}: "
                "bring them to one size"
            )
        if batch and (len(batch) == BATCH or batch[0][1].shape != pair[0].shape):
            yield _stack(batch)
            batch = []
        batch.append((name, *pair))
    if batch:
        yield _stack(batch)


def _stack(batch: list[tuple[str, Tensor, Tensor]]) -> tuple[list[str], Tensor, Tensor]:
    names, source, target = zip(*batch, strict=True)
    return list(names), torch.stack(source), torch.stack(target)


def read_image(path: Path) -> Tensor:
    """Return (3, H, W) float32 in [0, 1]; see IMAGES for what becomes of other than 8-bit RGB. Raises UserError naming
    it."""
    try:
        with open_image(path) as image:
            values = _values(image, path)
    except UNREADABLE as error:
        raise UserError(f"cannot read image '{path}' ({reason(error)}): replace or remove it") from error
    if not (values.min() >= 0 and values.max() <= 1):  # in this form it also catches NaN
        raise UserError(f"image '{path}' holds NaN or values out of range: replace or remove it")
    if values.shape[2] == 4:
        alpha = values[..., 3:]
        values = alpha * values[..., :3] + (1 - alpha)
    return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1).contiguous()


def _values(image: Image.Image, path: Path) -> np.ndarray:
    """Return (H, W, 1, 3 or 4) float32: grey, RGB or RGBA where 1 is the brightest value of the file's format."""
    raw_mode = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if raw_mode == "LA;16B" or (image.info.get("transparency") is not None and str(raw_mode).endswith(";16B")):
        raise ValueError("16-bit PNG with a kind of transparency that would cost it its precision")
    if raw_mode in ("RGB;16B", "RGBA;16B"):
        # Pillow keeps the upper byte of 16-bit colour. Told that the bytes stand in the other order it keeps the lower.
        upper = np.asarray(image, np.float32)
        with Image.open(path) as again:
            codec, box, offset, _ = again.tile[0]
            again.tile = [(codec, box, offset, raw_mode.replace("16B", "16L"))]
            return (256 * upper + np.asarray(again, np.float32)) / 65535
    if image.mode == "F":
        return np.array(image, np.float32)[..., None]
    if image.mode.startswith("I"):
        return np.asarray(image, np.float32)[..., None] / 65535
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"), np.float32) / 255
