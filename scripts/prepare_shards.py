"""python scripts/prepare_shards.py --images datasets/imagenet --output datasets/imagenet_shards
python scripts/prepare_shards.py --images datasets/cifar10 --output datasets/cifar10_cache --cache 32

Packs the folders train and val of an image folder, for --data.dataset shards or cache. Shards: tar files in
WebDataset's layout that hold the image files unchanged. Cache: decoded pixels, for small images; those of another size
are resized to SIDE on their shorter side and cropped to their centre. Stopped at any time, the same command continues
where it was.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torchvision import transforms as tv
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.classes import CLASSES
from data.decode import UNREADABLE
from data.folders import DATASETS, SPLITS, describe_sample, open_dataset
from data.shards import INDEX, open_index
from utils.errors import CONTINUES, UserError, reason, run_command, writing_to
from utils.files import existing_folder, remove_leftovers, write_atomic, write_json, write_text
from utils.ownership import refuse_others
from utils.tool_parser import ToolParser

PLAN = ".plan.json"  # what an output folder is made of
BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, metavar="FOLDER", required=True, help="holds the folders train and val")
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True, help="gets the packed set")
    parser.add_argument(
        "--shard_mb", type=int, default=256, metavar="MB", help="size of a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=int, metavar="SIDE", help="write decoded pixels, SIDE x SIDE, instead of shards"
    )
    kinds = [name for name in DATASETS if name != "cache"]
    text = "with --cache: kind of data set in --images (default: %(default)s)"
    parser.add_argument("--dataset", choices=kinds, default="folder", help=text)
    args = parser.parse_args()
    for name in ("shard_mb", "cache"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.dataset != "folder" and args.cache is None:
        parser.error("shards hold image files: --dataset goes with --cache")
    existing_folder(args.images, "image folder")
    output, images = args.output.resolve(), args.images.resolve()
    if output == images or any(images / split in (output, *output.parents) for split in SPLITS):
        parser.error("--output must be another folder than --images, and outside of its splits")
    return args


class File(NamedTuple):
    path: str
    label: int
    size: int  # bytes


def list_files(dataset: Dataset) -> list[File]:
    files = []
    for path, label in tqdm(dataset.samples, desc="looking", unit="file", leave=False):
        try:
            files.append(File(path, label, os.stat(path).st_size))
        except OSError as error:
            raise UserError(f"cannot read image '{path}' ({reason(error)}): replace or remove it") from error
    return files


def on_tape(size: int) -> int:
    """Return the bytes that a file takes in a tar."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def shard_size(files: list[tuple[str, File]]) -> int:
    used = sum(on_tape(file.size) + on_tape(len(str(file.label))) for _, file in files) + 2 * BLOCK
    return -(-used // RECORD) * RECORD


def cut(files: list[File], largest: int) -> Iterator[list[tuple[str, File]]]:
    """Yield (key, file) of each shard; a shard holds one image at least and, beyond that, at most `largest` bytes."""
    shard: list[tuple[str, File]] = []
    used = 2 * BLOCK
    for number, file in enumerate(files):
        more = on_tape(file.size) + on_tape(len(str(file.label)))
        if shard and used + more > largest:
            yield shard
            shard, used = [], 2 * BLOCK
        shard.append((f"{number:08d}", file))
        used += more
    yield shard


def write_shard(shard: list[tuple[str, File]], bar: tqdm, target: BinaryIO) -> None:
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, file in shard:
            data = Path(file.path).read_bytes()
            if len(data) != file.size:
                raise UserError(f"'{file.path}' changed while it was packed: run this again when nothing writes there")
            suffix = Path(file.path).suffix.lower().replace(".jpeg", ".jpg")
            for name, content in ((key + suffix, data), (f"{key}.cls", str(file.label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            bar.update()


def pack(dataset: Dataset, folder: Path, args: argparse.Namespace) -> str:
    """Write the shards that `folder` does not have yet, and the index; checks what is there against what was read."""
    folder.mkdir(parents=True, exist_ok=True)
    files = list_files(dataset)
    same_plan(folder / PLAN, {"shard_mb": args.shard_mb, "files": digest(files), "count": len(files)})
    with tqdm(total=len(files), desc=folder.name, unit="image") as bar:
        for number, shard in enumerate(cut(files, args.shard_mb << 20)):
            path = folder / f"{number:06d}.tar"
            if path.is_file() and path.stat().st_size == shard_size(shard):
                bar.update(len(shard))
            else:
                (folder / INDEX).unlink(missing_ok=True)
                write_atomic(path, partial(write_shard, shard, bar))
    index = open_index(folder)
    found = list(zip(index.label.tolist(), index.length.tolist(), strict=True))
    if found != [(file.label, file.size) for file in files]:
        raise UserError(f"'{folder}' does not hold what was packed: remove it and run this again")
    return f"{len(index.shards)} shards"


def fill(dataset: Dataset, path: Path, side: int) -> None:
    """Write the pixels and labels of a split, unless it is there."""
    labels_path = path.with_name(f"{path.stem}_labels.npy")
    if path.is_file() and labels_path.is_file():
        return
    fit = tv.Compose([tv.Resize(side, tv.InterpolationMode.BICUBIC), tv.CenterCrop(side)])
    labels = np.zeros(len(dataset), np.int64)

    def write(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(dataset), side, side, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for number in tqdm(range(len(dataset)), desc=path.stem, unit="image"):
            try:
                image, labels[number] = dataset[number]
            except UNREADABLE as error:
                name = describe_sample(dataset, number)
                raise UserError(f"cannot read image '{name}' ({reason(error)}): replace or remove it") from error
            file.write(np.asarray(image if image.size == (side, side) else fit(image)).tobytes())

    write_atomic(path, write)
    write_atomic(labels_path, lambda file: np.save(file, labels))


def digest(files: list[File]) -> str:
    return hashlib.sha256(repr([(os.path.basename(path), *rest) for path, *rest in files]).encode()).hexdigest()


def same_plan(path: Path, plan: dict) -> None:
    """Remember what `path`'s folder is made of; raises UserError if that was something else before."""
    with suppress(FileNotFoundError, ValueError):
        if json.loads(path.read_text()) == plan:
            return
    if path.exists():
        raise UserError(f"'{path.parent}' was begun with other images or options: choose another --output or remove it")
    write_json(path, plan)


def prepare(args: argparse.Namespace) -> None:
    in_folders = args.dataset in ("folder", "shards")
    splits = [split for split in SPLITS if not in_folders or (args.images / split).is_dir()]
    if not splits:
        raise UserError(f"'{args.images}' has no folder train or val: expected {args.images}/train/<class>/<image>.jpg")
    sets = {split: open_dataset(args.dataset, str(args.images), split) for split in splits}
    names = next(iter(sets.values())).classes
    if odd := [name for name in names if "\n" in name]:
        raise UserError(f"the class name {odd[0]!r} has more than one line: rename its folder")
    if not (args.output / PLAN).exists():
        refuse_others(args.output, (), "this script")
    args.output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(args.output)
    counts = {split: len(dataset) for split, dataset in sets.items()}
    same_plan(args.output / PLAN, {"classes": names, "cache": args.cache, "images": counts})
    write_text(args.output / CLASSES, "".join(f"{name}\n" for name in names))
    for split, dataset in sets.items():
        if args.cache is None:
            what = pack(dataset, args.output / split, args)
        else:
            fill(dataset, args.output / f"{split}.npy", args.cache)
            what = f"{args.cache} x {args.cache} pixels each"
        print(f"{split}: {len(dataset):,} images of {len(names):,} classes, {what}, in {args.output}")


def main() -> None:
    args = parse_arguments()
    with writing_to(args.output):
        prepare(args)


if __name__ == "__main__":
    run_command(main, CONTINUES)
