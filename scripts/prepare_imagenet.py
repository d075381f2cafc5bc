"""python scripts/prepare_imagenet.py --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \\
    --devkit ILSVRC2012_devkit_t12.tar.gz --output datasets/imagenet

Turns the official ILSVRC2012 tars into OUTPUT/train/<wnid>/*.JPEG and OUTPUT/val/<wnid>/*.JPEG.
Stopped at any time, the same command continues where it was.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import CONTINUES, UserError, run_command, writing_to
from utils.files import write_atomic, write_json
from utils.tool_parser import ToolParser

CLASS_TAR = re.compile(r"n[0-9]{8}\.tar")
TRAIN_IMAGE = re.compile(r"n[0-9]{8}_[0-9]+\.JPEG")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_[0-9]{8}\.JPEG")
LABEL = re.compile(rf"({VAL_IMAGE.pattern})\s+(n[0-9]{{8}})")
SHA1 = {"train": "43eda4fe35c1705d6606a6a7a633bc965d194284", "val": "5f3f73da3395154b60528b2b2a2caf2374f5f178"}
LARGEST_LIST = 1 << 26  # bytes of a file of the devkit, which is compressed: the official ones have less than one MB
OFFICIAL = {"train": (1000, 1_281_167), "val": (1000, 50_000)}  # classes, images


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise UserError(f"'{text}' {'is not a file' if Path(text).exists() else 'does not exist'}: check the path")
    return Path(text)


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    add = partial(parser.add_argument, type=existing_file, metavar="FILE")
    add("--train", help="ILSVRC2012_img_train.tar: a tar of 1000 class tars")
    add("--val", help="ILSVRC2012_img_val.tar; needs its labels, from --devkit or --val_labels")
    add("--devkit", help="ILSVRC2012_devkit_t12.tar.gz")
    add("--val_labels", help="text with one line per image: ILSVRC2012_val_00000001.JPEG n01751748")
    add("--output", type=Path, metavar="FOLDER", required=True, help="gets the folders train and val")
    for split in SHA1:
        text = f"expected SHA-1 of the --{split} tar (default: %(default)s)"
        add(f"--sha1_{split}", type=str.lower, metavar="HEX", default=SHA1[split], help=text)
    parser.add_argument("--skip_sha1", action="store_true", help="do not check the SHA-1 of the tars")
    args = parser.parse_args()
    if not (args.train or args.val):
        parser.error("nothing to prepare, pass --train, --val or both")
    if args.val and bool(args.devkit) == bool(args.val_labels):
        parser.error("--val needs its labels, pass either --devkit or --val_labels")
    return args


def check_sha1(tar: Path, expected: str, split: str, marker: Path) -> None:
    """Compare the tar's SHA-1 with `expected`. `marker` remembers it: a restart must not hash 138 GB again."""
    stat, digest = tar.stat(), hashlib.sha1()
    checked = json.loads(marker.read_text()) if marker.exists() else {}
    key = f"{tar.name} {stat.st_size} {stat.st_mtime_ns}"
    if checked.get(key) == expected:
        return
    with open(tar, "rb") as file, tqdm(total=stat.st_size, unit="B", unit_scale=True, desc=f"{split} SHA-1") as bar:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        text = f"SHA-1 of '{tar}' is {digest.hexdigest()}, expected {expected}: download it again, or pass"
        raise UserError(f"{text} --sha1_{split} with the sum of your copy, or --skip_sha1")
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_json(marker, checked | {key: expected})


@contextmanager
def whole_tar(source: BinaryIO, where: str, inner: bool = False) -> Iterator[tarfile.TarFile]:
    """Yield an open tar; damage, also when met while members are read, becomes a UserError."""
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            yield tar
            # tarfile takes a cut between two members for the end; only a tar framed by another may lack the end marker
            source.seek(tar.offset)
            block = source.read(tarfile.BLOCKSIZE)
            if block != bytes(tarfile.BLOCKSIZE) and (block or not inner):
                raise tarfile.ReadError("no end-of-archive marker")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{where} is damaged or cut short ({error}): download the tar again") from error


def official_files(tar: tarfile.TarFile, pattern: re.Pattern, where: str) -> list[tuple[str, tarfile.TarInfo]]:
    """Return (base name, member) of the files in a tar. Paths are built from these names only, never from a member's
    path."""
    files = []
    for member in tar:
        path = PurePosixPath(member.name)
        inside = not path.is_absolute() and ".." not in path.parts
        if inside and member.isreg() and not member.issparse() and pattern.fullmatch(path.name):
            files.append((path.name, member))
        elif not (inside and member.isdir()):
            text = f"member {member.name!r} of {where} is not a plain file named like the official ones"
            raise UserError(f"{text}, nothing of that tar was extracted: download it again from image-net.org")
    if not files:
        raise UserError(f"{where} holds no files: download the tar again")
    return files


def prepare_train(path: Path, folder: Path) -> tuple[int, None]:
    """Extract the classes `folder` does not have yet; returns how many (classes, images) it must have then."""
    for leftover in folder.glob(".n*.partial"):
        shutil.rmtree(leftover)
    with open(path, "rb") as file, whole_tar(file, f"'{path}'") as tar:
        classes = official_files(tar, CLASS_TAR, f"'{path}'")
        todo = [item for item in classes if not (folder / item[0].removesuffix(".tar")).is_dir()]
        with tqdm(todo, total=len(classes), initial=len(classes) - len(todo), desc="train", unit="class") as bar:
            for name, member in bar:
                extract_class(tar.extractfile(member), folder / name.removesuffix(".tar"), f"'{name}' in '{path}'")
    return len(classes), None


def extract_class(source: BinaryIO, target: Path, where: str) -> None:
    """Extract a class tar beside its place and rename the folder once it is whole."""
    unfinished = target.with_name(f".{target.name}.partial")
    with whole_tar(source, where, inner=True) as tar:
        files = official_files(tar, TRAIN_IMAGE, where)
        unfinished.mkdir(parents=True)
        for name, member in files:
            with open(unfinished / name, "xb") as file:
                shutil.copyfileobj(tar.extractfile(member), file)
    os.sync()  # else a power cut could leave empty images in a folder that counts as finished
    os.replace(unfinished, target)


def prepare_val(path: Path, folder: Path, labels: dict[str, str]) -> tuple[None, int]:
    """Extract the images `folder` does not have yet; returns how many (classes, images) it must have then."""
    for leftover in folder.glob("n*/.*.tmp"):
        leftover.unlink()
    with open(path, "rb") as file, whole_tar(file, f"'{path}'") as tar:
        files = official_files(tar, VAL_IMAGE, f"'{path}'")
        if missing := [name for name, _ in files if name not in labels]:
            text = f"{len(missing)} images of '{path}' have no label, the first is {missing[0]}"
            raise UserError(f"{text}: add them to the --val_labels file, or pass the --devkit of the same release")
        with tqdm(files, desc="val", unit="file") as bar:
            for name, member in bar:
                target = folder / labels[name] / name
                if target.is_file() and target.stat().st_size == member.size:
                    continue
                content = tar.extractfile(member).read()
                if target.exists() and not (target.is_file() and content.startswith(target.read_bytes())):
                    raise UserError(f"'{target}' is not the one in '{path}': move it, or choose another --output")
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(target, lambda file, content=content: file.write(content))
    return None, len(files)


def devkit_labels(path: Path) -> list[str]:
    """Return a line 'image wnid' for each validation image, as in a --val_labels file."""
    from scipy.io import loadmat  # here, so that --val_labels does without SciPy

    try:
        with tarfile.open(path) as tar:
            members = {PurePosixPath(member.name).name: member for member in tar if member.size <= LARGEST_LIST}
            meta = tar.extractfile(members["meta.mat"]).read()
            truth = tar.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read()
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets.flat if s["num_children"] == 0}
        return [f"ILSVRC2012_val_{number:08d}.JPEG {wnids[int(line)]}" for number, line in enumerate(truth.split(), 1)]
    except Exception as error:  # SciPy and tarfile raise many kinds on damaged files
        raise UserError(f"cannot read the labels from --devkit '{path}' ({error!r}): download it again") from error


def read_labels(args: argparse.Namespace) -> dict[str, str]:
    """Return the class name by name of validation image."""
    lines = devkit_labels(args.devkit) if args.devkit else args.val_labels.read_text(errors="replace").splitlines()
    matches = [(LABEL.fullmatch(line.strip()), line) for line in lines if line.strip()]
    if odd := [line for match, line in matches if not match]:
        text = f"label {odd[0]!r} in '{args.devkit or args.val_labels}' is not like"
        raise UserError(f"{text} 'ILSVRC2012_val_00000001.JPEG n01751748': correct it or download the file again")
    return {match[1]: match[2] for match, _ in matches}


def verify(folder: Path, wanted: tuple[int | None, int | None]) -> None:
    """Print how many classes and images `folder` holds; raises when a number differs from the one wanted."""
    counts = [sum(name.endswith(".JPEG") for name in os.listdir(entry)) for entry in folder.iterdir() if entry.is_dir()]
    found = len(counts), sum(counts)
    print(f"{folder.name}: {found[0]:,} classes, {found[1]:,} images in {folder}")
    for number, right, what in zip(found, wanted, ("classes", "images"), strict=True):
        if right not in (None, number):
            raise UserError(
                f"'{folder}' holds {number} {what}, expected {right}: remove that folder and run this again"
            )


def prepare(args: argparse.Namespace) -> None:
    labels = read_labels(args) if args.val else {}
    tars = {split: getattr(args, split) for split in SHA1 if getattr(args, split)}
    sums = {} if args.skip_sha1 else {split: getattr(args, f"sha1_{split}") for split in tars}
    for split, expected in sums.items():
        check_sha1(tars[split], expected, split, args.output / ".sha1_checked.json")
    for split, tar in tars.items():
        folder = args.output / split
        wanted = prepare_train(tar, folder) if split == "train" else prepare_val(tar, folder, labels)
        verify(folder, OFFICIAL[split] if sums.get(split) == SHA1[split] else wanted)
    folders = [args.output / split for split in SHA1 if (args.output / split).is_dir()]
    found = [{entry.name for entry in folder.iterdir() if entry.is_dir()} for folder in folders]
    if len(found) == 2 and (odd := sorted(found[0] ^ found[1])):
        text = f"train and val of '{args.output}' differ in {len(odd)} classes, '{odd[0]}' is only in one of them"
        raise UserError(f"{text}: prepare both from the same release")


def main() -> None:
    args = parse_arguments()
    with writing_to(args.output):
        prepare(args)


if __name__ == "__main__":
    run_command(main, CONTINUES)
