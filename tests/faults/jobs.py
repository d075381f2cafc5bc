"""The commands that are broken, small enough for seconds, and what two runs of one must have in common."""

import json
import shlex
from pathlib import Path

import torch
from PIL import Image
from processes import Job

from data.demo import write_digits
from models import build_model
from models.checkpoints import save_checkpoint

TINY = shlex.split(
    "--data.image_size 32 --data.batch_size 8 --data.workers 0 --augment.repeats 1 --augment.rand_augment null "
    "--optim.mixup 0.8 --optim.cutmix 0 --optim.ema 0.9 --optim.warmup_epochs 1 --optim.epochs 5 --optim.lr 0.1 "
    "--model.name vit --model.patch_size 8 --model.embed_dim 24 --model.depth 1 --model.num_heads 2 "
    "--model.unknown true --model.localization nonlinear --jigsaw.mask_ratio 0.5 --jigsaw.start_epoch 1 "
    "--jigsaw.min_block 2 --jigsaw.max_block 8 --log.images_every 2 --device cpu --resume auto"
)
VICTIM = shlex.split(
    "--attack dlg --attack_options.iterations 6 --attack_options.restarts 1 --model lenet --num_images 12 "
    "--model_options.num_classes 10 --image_size 32 --dtype float64 --victims_at_once 1 --device cpu --resume auto"
)
CORRUPTED = shlex.split(
    "--corruptions gaussian_noise jpeg_compression --severities 1 3 5 --resize 32 --size 32 --workers 1"
)
SEARCH = shlex.split("--number 6 --samples 1 --draws 1 --batch 10 --batches 1 --device cpu --resume auto")
EPOCHS, STEPS = 5, 10  # of TINY


def make_jobs(folder: Path) -> dict[str, Job]:
    """Every job by name, on data that is written into `folder`."""
    data, victim = write_data(folder / "digits"), folder / "victim.pt"
    if not victim.exists():
        model = build_model("vit", num_classes=10, image_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
        save_checkpoint(victim, {"arguments": model.arguments, "model": model.state_dict(), "normalize": None})
    train = [*TINY, "--data.path", str(data)]
    pair, images = [*train, "--data.batch_size", "4"], ["--images", str(data / "val")]
    policies = ["--checkpoint", str(victim), "--data", str(data), *SEARCH]
    training = {"compare": trained, "saved": last_step, "whole": whole_files, "unit": "steps"}
    campaign = {"compare": attacked, "saved": finished_images, "whole": whole_files, "unit": "images"}
    searching = campaign | {"compare": searched}
    files = {"compare": corrupted, "saved": count_files, "whole": whole_files, "unit": "files"}
    return {
        "training": Job("train.py", train, **training),
        "training on 2": Job("train.py", pair, processes=2, **training),
        "attack": Job("attack.py", [*VICTIM, *images], **campaign),
        "ATS search": Job("defenses/ats/search.py", policies, **searching),
        "ImageNet-C": Job(
            "scripts/prepare_imagenet_c.py",
            ["--source", str(data / "val"), *CORRUPTED],
            finished=lambda output: count_files(output) == len(list(data.glob("val/*/*.png"))) * 6,
            **files,
        ),
    }


def write_data(folder: Path) -> Path:
    """Part of the embedded digits: 80 training images, 30 for validation."""
    if not (folder / "complete").exists():
        write_digits(folder)
        for split, number in (("train", 8), ("val", 3)):
            for label in (folder / split).iterdir():
                for path in sorted(label.iterdir())[number:]:
                    path.unlink()
        (folder / "complete").touch()
    return folder


def trained(folder: Path) -> object:
    content = [torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt")]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return comparable([content, rows, json.loads((folder / "results.json").read_text())])


def attacked(folder: Path) -> object:
    results = json.loads((folder / "results.json").read_text())
    pictures = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}
    return comparable([results, pictures, (folder / "partial").exists()])


def searched(folder: Path) -> object:
    return comparable(json.loads((folder / "policies.json").read_text()))


def corrupted(folder: Path) -> object:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))}


def comparable(tree: object) -> object:
    """The tree without durations, tensors as their bytes, NaN as text."""
    if isinstance(tree, dict):
        return {key: comparable(value) for key, value in tree.items() if key not in DURATIONS}
    if isinstance(tree, (list, tuple)):
        return [comparable(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()
    return repr(tree) if isinstance(tree, float) else tree


DURATIONS = ("seconds", "train/images_per_second")


def whole_files(folder: Path) -> None:
    """Raise when something that stands under its final name cannot be read in full."""
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".png", ".JPEG"):
            with Image.open(path) as image:
                image.load()


def last_step(folder: Path) -> int:
    if not (folder / "last.pt").exists():
        return 0
    content = torch.load(folder / "last.pt", weights_only=True)
    return content["epoch"] * content["steps"] + content["step"]


def finished_images(folder: Path) -> int:
    rows = set()
    for path in (folder / "partial").glob("*.jsonl"):
        for line in path.read_text(errors="replace").split("\n"):
            try:
                rows.add(json.loads(line)["index"])
            except (ValueError, KeyError, TypeError):
                continue
    return len(rows)


def count_files(folder: Path) -> int:
    return sum(not path.name.startswith(".") for path in folder.rglob("*.JPEG"))
