"""python scripts/prepare_imagenet_c.py --source datasets/imagenet/val --output datasets/imagenet-c
python scripts/prepare_imagenet_c.py --source photograph.png --contact_sheet sheet.jpg

Corrupts SOURCE/<class>/<image> into OUTPUT/<corruption>/<severity>/<class>/<image>.JPEG, the layout of ImageNet-C: 19
corruptions at 5 severities. Every file depends on the seed, its corruption, severity, class and name, and on nothing
else. Stopped at any time, the same command continues where it was. The published images remain the ones to cite: their
noise is another draw, and their frost was photographed: --frost takes such photographs (see data/corruptions.py).
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import IMG_EXTENSIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, frost_of
from data.decode import UNREADABLE, is_litter, read_rgb
from data.images import list_images
from utils.errors import CONTINUES, UserError, look_up, reason, run_command
from utils.files import existing_folder, write_atomic, write_json
from utils.ownership import refuse_others
from utils.progress import track
from utils.seeds import derive_seed
from utils.tool_parser import ToolParser

SETTINGS = "settings.json"  # in OUTPUT: what a later run has to agree with
SHEET_SEVERITIES, SHEET_COLUMNS = (3, 5), 5


class Settings(NamedTuple):
    """What decides the pixels of the corrupted images, besides their names."""

    seed: int
    size: int
    resize: int
    quality: int
    frost: str | None = None  # the names of the photographs of frost, and a sum over their files


def corruption(text: str) -> str:
    look_up(CORRUPTIONS, text, "corruption")
    return text


def whole(text: str, low: int, high: int) -> int:
    if not text.isdigit() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got '{text}'")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    number = partial(parser.add_argument, metavar="N")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = "folder of class folders such as ImageNet's val; for a contact sheet also one image file"
    parser.add_argument("--source", type=Path, metavar="FOLDER", required=True, help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="gets one folder per corruption")
    text = "write a picture of all corruptions at severities 3 and 5 of the first image instead"
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE", help=text)
    text = "which (default: all 19)"
    parser.add_argument("--corruptions", nargs="+", type=corruption, metavar="NAME", default=[*CORRUPTIONS], help=text)
    text = "which, from 1 to 5 (default: all)"
    level = partial(whole, low=1, high=5)
    parser.add_argument("--severities", nargs="+", type=level, metavar="N", default=[*SEVERITIES], help=text)
    number(
        "--resize",
        type=partial(whole, low=0, high=8192),
        default=256,
        help="shorter side before the crop in pixels, 0: as it is (default: %(default)s)",
    )
    number(
        "--size",
        type=partial(whole, low=0, high=8192),
        default=224,
        help="side of the square centre crop in pixels, 0: no crop (default: %(default)s)",
    )
    number(
        "--quality",
        type=partial(whole, low=1, high=100),
        default=85,
        help="JPEG quality of what is written (default: %(default)s)",
    )
    number(
        "--seed",
        type=partial(whole, low=0, high=2**63 - 1),
        default=0,
        help="fixes all that is drawn (default: %(default)s)",
    )
    text = "folder of photographs of frost, or one file, to paste as the published images do (default: ice is drawn)"
    parser.add_argument("--frost", type=Path, metavar="FOLDER", help=text)
    number(
        "--limit",
        type=partial(whole, low=1, high=10**9),
        help="corrupt only so many images, spread evenly over the set",
    )
    number(
        "--workers",
        type=partial(whole, low=1, high=4096),
        default=cores,
        help="processes (default: one per core, here %(default)s)",
    )
    args = parser.parse_args(argv)
    if (args.output is None) == (args.contact_sheet is None):
        parser.error("pass either --output or --contact_sheet")
    return args


def list_sources(folder: Path, limit: int | None) -> list[Path]:
    """Return images of SOURCE's class folders, sorted. Raises UserError when two would be written to one name."""
    existing_folder(folder, "--source")
    names = (path for path in folder.glob("*/*") if not any(map(is_litter, path.relative_to(folder).parts)))
    found = sorted(path for path in names if path.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise UserError(f"'{folder}' has no images in class folders: expected {folder}/<class>/<image>.JPEG")
    for first, second in zip(found, found[1:], strict=False):
        if first.with_suffix("") == second.with_suffix(""):
            raise UserError(f"'{first}' and '{second.name}' would be written to one file: rename one of them")
    used = min(limit or len(found), len(found))
    return [found[place * len(found) // used] for place in range(used)]


def readable(path: Path) -> Image.Image:
    try:
        return read_rgb(path)
    except UNREADABLE as error:
        raise UserError(f"cannot read image '{path}' ({reason(error)}): replace or remove it") from None


def prepared(path: Path, settings: Settings) -> np.ndarray:
    """Return the image as the original reads it: RGB, shorter side resized (bilinear), centre crop; uint8 (H, W, 3)."""
    image = readable(path)
    if settings.resize:
        short, long = sorted(image.size)
        other = int(settings.resize * long / short)
        size = (settings.resize, other) if image.width <= image.height else (other, settings.resize)
        image = image.resize(size, Image.Resampling.BILINEAR)
    if settings.size:
        if min(image.size) < settings.size:
            found = f"{image.width} x {image.height} pixels"
            raise UserError(f"'{path}' has {found}, less than --size {settings.size}: lower it or set --resize")
        left, top = (round((side - settings.size) / 2) for side in image.size)
        image = image.crop((left, top, left + settings.size, top + settings.size))
    return np.asarray(image)


def photographs_of(folder: Path | None) -> tuple[list[Path], str | None]:
    """Return the photographs of frost, sorted, and what identifies them, None without any."""
    if folder is None:
        return [], None
    paths = list_images(folder)
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths))
    return paths, f"{', '.join(path.name for path in paths)} ({digest.hexdigest()[:16]})"


@lru_cache(maxsize=1)
def corruptions_with(photographs: tuple[Path, ...]) -> dict[str, Corruption]:
    """Return the corruptions, frost with these photographs if there are any. Read once in each process."""
    if not photographs:
        return CORRUPTIONS
    return CORRUPTIONS | {"frost": frost_of([np.asarray(readable(path)) for path in photographs])}


def corrupt(
    path: Path, missing: list[tuple[str, int]], output: Path, settings: Settings, photographs: tuple[Path, ...]
) -> int:
    """Write the `missing` (corruption, severity) files of one image; returns how many there were."""
    image, known = prepared(path, settings), corruptions_with(photographs)
    for name, severity in missing:
        rng = np.random.default_rng(derive_seed(settings.seed, name, severity, f"{path.parent.name}/{path.stem}"))
        changed = Image.fromarray(known[name](image, severity, rng))
        save = partial(changed.save, format="JPEG", quality=settings.quality, optimize=True)
        write_atomic(target(output, name, severity, path), save)
    return len(missing)


def target(output: Path, name: str, severity: int, source: Path) -> Path:
    return output / name / str(severity) / source.parent.name / f"{source.stem}.JPEG"


def unfinished(
    sources: list[Path], pairs: list[tuple[str, int]], output: Path
) -> Iterator[tuple[Path, list[tuple[str, int]]]]:
    """Yield (image, its pairs that are not on disk), where there are any. Makes the folders and clears what a kill
    left."""
    by_class: dict[str, list[Path]] = {}
    for path in sources:
        by_class.setdefault(path.parent.name, []).append(path)
    for members in by_class.values():
        there = {}
        for name, severity in pairs:
            folder = target(output, name, severity, members[0]).parent
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            there[name, severity] = set(os.listdir(folder))
        for path in members:
            if missing := [pair for pair in pairs if f"{path.stem}.JPEG" not in there[pair]]:
                yield path, missing


def check_settings(output: Path, settings: Settings) -> None:
    """Remember the settings in OUTPUT, or raise UserError where it was begun with others."""
    file = output / SETTINGS
    if not file.exists():
        refuse_others(output, (), "this script")
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, settings._asdict())
    found = json.loads(file.read_text())
    for key, value in settings._asdict().items():
        if found.get(key) != value:
            text = f"'{output}' was begun with --{key} {found.get(key)}, not {value}"
            raise UserError(f"{text}: pass the same, or another --output")


def prepare(args: argparse.Namespace, settings: Settings, photographs: tuple[Path, ...]) -> None:
    sources = list_sources(args.source, args.limit)
    check_settings(args.output, settings)
    pairs = [(name, severity) for name in dict.fromkeys(args.corruptions) for severity in sorted({*args.severities})]
    todo = list(unfinished(sources, pairs, args.output))
    total = len(sources) * len(pairs)
    corruptions_with(photographs)  # one that cannot be read is named before work starts
    work = partial(corrupt, output=args.output, settings=settings, photographs=photographs)
    written = 0
    for number in track(run(work, todo, args.workers), len(todo), "images", print):
        written += number
    print(f"wrote {written:,} files, {total - written:,} were there: {len(sources):,} images in {args.output}")


def run(work, todo: list[tuple], workers: int) -> Iterator[int]:
    """Return results of work(*item) as they come, in this process or in `workers` others."""
    if min(workers, len(todo)) <= 1:
        yield from (work(*item) for item in todo)
        return
    pool = ProcessPoolExecutor(min(workers, len(todo)), initializer=leave_signals_to_parent)
    try:
        yield from (done.result() for done in as_completed([pool.submit(work, *item) for item in todo]))
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for memory: lower --workers and run this again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def draw_sheet(image: np.ndarray, names: list[str], seed: int, known: dict[str, Corruption]) -> Image.Image:
    """Return a labelled grid: the image, then each corruption at severities 3 and 5 side by side."""
    height, width = image.shape[:2]
    gap, text = max(4, width // 40), max(12, width // 13)
    cell = np.array([2 * width + gap, height + 2 * text])
    rows = -(-(len(names) + 1) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (*((cell + gap) * (SHEET_COLUMNS, rows) + gap).tolist(),), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(text)
    for place, name in enumerate(["original", *names]):
        left, top = ((cell + gap) * (place % SHEET_COLUMNS, place // SHEET_COLUMNS) + gap).tolist()
        draw.text((left, top), name, "black", font)
        for column, severity in enumerate(SHEET_SEVERITIES if place else ()):
            rng = np.random.default_rng(derive_seed(seed, name, severity, "contact sheet"))
            changed = known[name](image, severity, rng)
            sheet.paste(Image.fromarray(changed), (left + column * (width + gap), top + 2 * text - text // 2))
        if not place:
            sheet.paste(Image.fromarray(image), (left, top + 2 * text - text // 2))
            note = "left severity 3,\nright severity 5"
            draw.text((left + width + gap, top + 2 * text - text // 2), note, "dimgray", font)
    return sheet


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        photographs, frost = photographs_of(args.frost)
        settings = Settings(args.seed, args.size, args.resize, args.quality, frost)
        if args.output:
            prepare(args, settings, tuple(photographs))
            return
        if args.contact_sheet.resolve() == args.source.resolve():
            raise UserError("--contact_sheet is the file of --source: choose another")
        source = args.source if args.source.is_file() else list_sources(args.source, 1)[0]
        sheet = draw_sheet(
            prepared(source, settings), args.corruptions, args.seed, corruptions_with(tuple(photographs))
        )
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}.get(args.contact_sheet.suffix.lower())
        if kind is None:
            raise UserError(f"--contact_sheet '{args.contact_sheet}' must end in .jpg or .png")
        write_atomic(args.contact_sheet, partial(sheet.save, format=kind, quality=settings.quality, optimize=True))
        print(f"wrote {args.contact_sheet}")
    except OSError as error:
        text = f"cannot write '{args.output or args.contact_sheet}' ({error}): free space or fix permissions"
        raise UserError(f"{text} and run this again, finished work is kept") from error


if __name__ == "__main__":
    run_command(main, CONTINUES)
