"""Inverting Gradients beside breaching, image by image: equal victims, images, starts and iterations.

    python -m benchmarks.beside_breaching --images CIFAR10/val --model convnet --num_images 20 --iterations 120

Both run cosine, padded total variation, signed Adam, boxed, in float32 on one thread; labels are known, weights random.
PSNR in dB of each image by each tool, then means, spread and the paired difference. Every image is a line of
--output, and a run that was stopped continues there. Needs `pip install breaching` (0.1.2).
"""

import json
import os
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from attacks.presets.inverting_gradients import inverting_gradients
from attacks.threat_model.leak import Leak
from benchmarks import peers
from data.images import class_folders, class_of, list_images, read_images
from eval.psnr_ssim import psnr
from models import build_model
from reports.tables import Measured
from utils.errors import UserError, run_command
from utils.progress import track
from utils.statistics import describe
from utils.tool_parser import ToolParser

MEAN, STD = (0.4914673, 0.4822618, 0.4467702), (0.2470322, 0.2434851, 0.2615879)  # of CIFAR-10


def compare(leak: Leak, image: torch.Tensor, seed: int, iterations: int, tv: float) -> dict[str, float]:
    """Return {tool: PSNR in dB} from the start that `seed` draws."""
    first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
    options = {"tv": tv, "tv_form": "padded", "iterations": iterations}
    found = {"ours": inverting_gradients(leak, generator=first, **options).images}
    found["breaching"] = peers.breaching(leak, second, lambda: None, iterations=iterations, tv=tv)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    pixels = {tool: (images * std + mean).clamp(0, 1) for tool, images in (found | {"truth": image}).items()}
    return {tool: float(psnr(pixels[tool], pixels["truth"])) for tool in found}


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="image folder with one folder per class")
    parser.add_argument("--model", default="convnet", help="a victim for 32 px images (default: %(default)s)")
    parser.add_argument("--width", type=int, help="channels of the first stage (default: the model's)")
    parser.add_argument("--num_images", type=int, default=20, help="spread over the folder (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=120, help="of each attack (default: %(default)s)")
    parser.add_argument(
        "--tv", type=float, default=0.2, help="weight of total variation (default: %(default)s, that of breaching)"
    )
    parser.add_argument("--output", type=Path, required=True, help="file of results, one JSON object per image")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths, classes = list_images(arguments.images, arguments.num_images), class_folders(arguments.images)
    width = {"width": arguments.width} if arguments.width else {}
    model = build_model(arguments.model, num_classes=len(classes), image_size=32, **width).eval()
    run = {key: getattr(arguments, key) for key in ("model", "width", "iterations", "tv")}
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    rows = {row["image"]: row for row in map(json.loads, lines)}
    if any(row.get(key) != value for row in rows.values() for key, value in run.items()):
        raise UserError(f"--output '{arguments.output}' holds results of other settings: choose another file")
    names, parameters = zip(*model.named_parameters(), strict=True)
    for k, path in enumerate(track(paths, len(paths), arguments.model, print)):
        name = str(path.relative_to(arguments.images))
        if name in rows:
            continue
        image, label = (
            read_images([path], 32, MEAN, STD),
            torch.tensor([classes.index(class_of(path, arguments.images))]),
        )
        gradients = torch.autograd.grad(cross_entropy(model(image), label), parameters)
        leak = Leak(model, dict(zip(names, gradients, strict=True)), (3, 32, 32), 1, label, mean=MEAN, std=STD)
        rows[name] = run | {"image": name} | compare(leak, image, k, arguments.iterations, arguments.tv)
        with arguments.output.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
    ours, theirs = ([row[tool] for row in rows.values()] for tool in ("ours", "breaching"))
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    for name, values in (("ours", ours), ("breaching", theirs), ("paired", difference)):
        mean, std, number = describe(values).values()
        ends = f"[{min(values):.3f}, {max(values):.3f}]"
        print(f"{name:<10} {Measured(mean, std, '.3f', '.3f')} dB {ends}, n = {number}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    run_command(main)
