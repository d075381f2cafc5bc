"""Speed of the input pipeline on one core: python -m benchmarks.pipeline --images datasets/imagenet/val

One process, one thread. In every round each candidate handles the same photographs once, the order rotating from round
to round; time is that of the processor. A ratio is the median over rounds of the base's time / the candidate's time in
the same round, with its quartiles. The official way is torchvision's loader and timm's create_transform
(rand-m9-mstd0.5-inc1, bicubic, erasing 0.25). All draw the same from the same seeds, and batches are stacked.
"""

import contextlib
import io
import os
import runpy
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from torchvision.datasets.folder import pil_loader

from benchmarks.interleaved_timing import interleave
from data.augmentation_parameters import make_plan
from data.decode import read_rgb
from data.device_augment import DeviceAugment
from data.folders import open_dataset
from data.images import list_images
from data.loaders import Batch, TransformedDataset, collate
from data.options import AugmentOptions
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform, train_transform
from utils.errors import run_command
from utils.files import write_json
from utils.machine import describe_machine
from utils.seeds import seed_cpu
from utils.tool_parser import ToolParser

SIDE, BATCH, CACHED = 224, 20, 256
POLICY = "rand-m9-mstd0.5-inc1"
LEFT = "what the loader leaves to the device"
GOALS = {"ours, split": ">= 1.15", "ours, device": ">= 1.8"}
NORMALIZE = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def bits(image, bits_to_keep: int, **options):
    return posterize(image, max(1, bits_to_keep), **options)


def official_train():
    """Return timm's transform; its posterize may ask for 0 bits, at which the newest Pillow stops."""
    transform = create_transform(
        SIDE, is_training=True, auto_augment=POLICY, interpolation="bicubic", re_prob=0.25, re_mode="pixel"
    )
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            operation.aug_fn = bits if operation.aug_fn is posterize else operation.aug_fn
    return transform


class Official:
    """Their way: open, convert, transform, stack."""

    def __init__(self, paths: list[str], transform):
        self.paths, self.transform, self.round = paths, transform, 0

    def batches(self) -> Iterator[torch.Tensor]:
        self.round += 1
        for start in range(0, len(self.paths), BATCH):
            yield torch.stack([self.image(place) for place in range(start, min(start + BATCH, len(self.paths)))])

    def image(self, place: int) -> torch.Tensor:
        seed_cpu(1000 * self.round + place)
        return self.transform(pil_loader(self.paths[place]))


class Ours:
    """Our way: what a loader worker does."""

    def __init__(self, dataset, transform):
        self.data, self.round = TransformedDataset(dataset, transform), 0

    def batches(self) -> Iterator[Batch]:
        self.round += 1
        keys = [(place, 1000 * self.round + place) for place in range(len(self.data))]
        for start in range(0, len(keys), BATCH):
            yield collate([self.data[key] for key in keys[start : start + BATCH]])


def loading(source: Official | Ours) -> Callable[[], None]:
    """Load all batches and keep none."""
    return lambda: deque(source.batches(), maxlen=0).clear()


def each(function: Callable, items: list) -> Callable[[], None]:
    def run() -> None:
        for item in items:
            function(item)

    return run


def pack(images: Path, folder: Path, *options: str) -> str:
    """Pack the photographs as the script does; its progress is not shown."""
    before, sys.argv = sys.argv, ["", "--images", str(images), "--output", str(folder), *options]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path("scripts/prepare_shards.py", run_name="packing")["main"]()
    finally:
        sys.argv = before
    return str(folder)


def candidates(paths: list[Path], work: Path, device: torch.device) -> dict[str, dict[str, Callable]]:
    """Return groups of candidates; the first of a group is its base. device: does what the loader leaves to it."""
    for number, path in enumerate(paths):
        link = work / "images" / "val" / "all" / f"{number:05d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    folder = open_dataset("folder", str(work / "images"), "val")
    shards = open_dataset("shards", pack(work / "images", work / "shards"), "val")
    cache = open_dataset("cache", pack(work / "images", work / "cache", "--cache", str(CACHED)), "val")
    files, places = [path for path, _ in folder.samples], list(range(len(folder)))
    ours = {where: train_transform(SIDE, AugmentOptions(where=where)) for where in ("loader", "split", "device")}
    evaluation = create_transform(SIDE, interpolation="bicubic", crop_pct=0.875)
    finish = DeviceAugment(device, **NORMALIZE)
    waiting = {where: list(Ours(folder, ours[where]).batches()) for where in ("split", "device")}
    return {
        "training": {
            "official": loading(Official(files, official_train())),
            "decoding alone (Pillow)": each(pil_loader, files),
            "ours, loader": loading(Ours(folder, ours["loader"])),
            "ours, split": loading(Ours(folder, ours["split"])),
            "ours, device": loading(Ours(folder, ours["device"])),
            "ours, device, from shards": loading(Ours(shards, ours["device"])),
            f"ours, device, from a cache of {CACHED} px": loading(Ours(cache, ours["device"])),
        },
        LEFT: {
            where: each(lambda batch: finish(batch.images.to(device), batch.plan), batches)
            for where, batches in waiting.items()
        },
        "evaluation": {
            "official": loading(Official(files, evaluation)),
            "ours": loading(Ours(folder, eval_transform(SIDE))),
        },
        "reading and decoding": {
            "folder": each(folder.__getitem__, places),
            "shards": each(shards.__getitem__, places),
            f"cache of {CACHED} px": each(cache.__getitem__, places),
        },
    }


def agreement(paths: list[Path]) -> dict[str, dict[str, float]]:
    """Return how far pixels of --augment.where device are from those of loader, in grey levels; nothing is erased."""
    finish, levels = DeviceAugment(torch.device("cpu"), **NORMALIZE), 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    found = {}
    for title, policy in (("crop and flip", None), ("with RandAugment", POLICY)):
        plain = AugmentOptions(rand_augment=policy, color_jitter=0, erasing=0)
        transforms = {where: train_transform(SIDE, replace(plain, where=where)) for where in ("loader", "device")}
        off = []
        for seed, path in enumerate(paths):
            images = {}
            for where, transform in transforms.items():
                seed_cpu(seed)
                images[where] = transform(read_rgb(path))
            pixels, rest = images["device"]
            whole = finish(pixels[None], make_plan([rest]))[0]
            off.append(((whole - images["loader"]) * levels).abs().round())
        off = torch.stack(off)
        shares = {f"within {most}": (off <= most).float().mean().item() for most in (0, 1, 2)}
        found[title] = shares | {"mean": off.mean().item()}
    return found


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs, searched below")
    parser.add_argument("--number", type=int, default=100, help="photographs, evenly spread (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what finishes batches")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = list_images(args.images, args.number)
    machine, before = describe_machine(), os.getloadavg()
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "torchvision", "timm", "pillow"))
    print(f"{machine['machine']['processor']}, {machine['machine']['cores']} cores, one used; {packages}")
    print(f"{len(paths)} photographs, {SIDE} px, {args.rounds} rounds, processor time\n")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for title, group in candidates(paths, Path(work), torch.device(args.device)).items():
            print(f"{title:<40}{'ms an image':>12}{'images/s':>10}{'ratio':>8}   quartiles", flush=True)
            where = args.device if title == LEFT else "cpu"
            times, base = interleave(group, args.rounds, device=where), next(iter(group))
            for name, found in times.items():
                ratios = [one / other for one, other in zip(times[base], found, strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                ms = statistics.median(found) / len(paths)
                row = {"group": title, "name": name, "what": f"{title}: {name}", "ms": ms, "ratio": ratio}
                rows.append(row | {"quartiles": [low, high], "goal": GOALS.get(name, "")})
                line = f"{name:<40}{ms:>12.3f}{1e3 / ms:>10.0f}{ratio:>8.2f}   [{low:.2f}, {high:.2f}]"
                print(line, flush=True)
            print()
    print("pixels of device against loader, in grey levels")
    for title, shares in (agreed := agreement(paths)).items():
        print(f"{title:<40}" + ", ".join(f"{name}: {share:.5f}" for name, share in shares.items()), flush=True)
    loads = [before, os.getloadavg()]
    print("load average before and after: " + ", ".join(f"{one:.1f}" for one, *_ in loads))
    if args.json:
        write_json(
            args.json,
            {"rows": rows, "agreement": agreed, "load": loads, "number": len(paths), "rounds": args.rounds, **machine},
        )


if __name__ == "__main__":
    run_command(main)
