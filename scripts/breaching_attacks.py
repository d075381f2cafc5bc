"""Attacks of breaching as they ship, beside ours, on the same leaks of small random ViTs, condition by condition.

    pip install breaching
    python scripts/breaching_attacks.py --images DIR --iterations 40 --output docs/results/breaching_attacks.json

DIR: pictures (CIFAR-10). Every instance draws a ViT, its images and what the defence draws, as in
scripts/interval_study.py. breaching's settings are its own but for the number of iterations (--iterations; 0: its own,
24,000 for Inverting Gradients). But for DLG it is told the labels, which ours are not. PSNR of an image: the best of
the pictures returned, patches in any order, at most 300 dB. The file is written after every cell, and cells that it
holds are not measured again. --only: these conditions alone, on the same leaks. Seconds are of the process.
"""

import contextlib
import io
import shlex
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.threat_model.client import Round
from benchmarks.peers import unfused
from data.images import list_images
from data.transforms import denormalize
from eval.psnr_ssim import psnr_any_order
from eval.reconstruction import mean_colour
from eval.report import read_results
from scripts.breaching_comparison import open_breaching
from scripts.interval_study import SCALE, SMALL, VICTIM, Cell, instance
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.progress import track
from utils.seeds import derive_seed
from utils.statistics import describe
from utils.tool_parser import ToolParser

SHIPPED = ("invertinggradients", "modern", "deepleakage", "april_analytic")


def cells(number: int) -> Iterator[Cell]:
    """Yield the conditions, each with the attack of ours that reads it best where it applies."""
    yield Cell("one image", number, "joint")
    yield Cell("batch of 2", number, "joint", model=SMALL, images=2)
    yield Cell("MJP 0.27", number, "joint", model=VICTIM | {"unknown": True}, ratio=0.27, dtype="float64")
    yield Cell("noise 1e-3", number, defense="noise", strength={"std": 1e-3})
    yield Cell("float16", number, defense="half_precision", strength={"format": "float16"})


class About(dict):
    """What breaching says of its data: asked for by key and by name."""

    __getattr__ = dict.__getitem__


class Wrapped(nn.Module):
    """The network as breaching's own ViTs hold theirs: as `model` of another, with all parameters in its graph."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = unfused(model).float()
        self.model.unknown_pos_embed = None  # its user does not know MJP

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def theirs(breaching: ModuleType, name: str, one: Round, seed: int, iterations: int) -> Tensor:
    """Return the pictures (F, C, H, W), normalised, that an attack of breaching makes of a round.

    Raises UserError with what it says where it cannot read the leak.
    """
    leak, model = one.leak, Wrapped(one.leak.model)
    about = About(
        shape=leak.image_shape, mean=leak.mean, std=leak.std, modality="vision", classes=10, task="classification"
    )
    payload = {"parameters": [*model.parameters()], "buffers": [*model.buffers()], "metadata": about}
    labels = None if name == "deepleakage" else one.private.labels  # that one looks for the labels itself
    client = {"num_data_points": leak.batch_size, "labels": labels, "local_hyperparams": None}
    gradients = [leak.gradients[key.removeprefix("model.")].float() for key, _ in model.named_parameters()]
    shared = {"gradients": gradients, "buffers": None, "metadata": client}
    steps = max(1, iterations // 20) if name == "deepleakage" else iterations  # one of L-BFGS has 20 gradients
    overrides = [f"optim.max_iterations={steps}"] if iterations and name != "april_analytic" else []
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        torch.manual_seed(seed)  # breaching draws its start from the global generator
        config = breaching.get_attack_config(name, overrides)
        attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config)
        try:
            return attacker.reconstruct([payload], [shared], {})[0]["data"].detach()
        except (AssertionError, AttributeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise UserError(f"{type(error).__name__}: {error}".strip(": ")) from error


def nearest(found: Tensor, one: Round) -> list[float]:
    """Return for each private image the PSNR in dB of the picture found that is nearest to it."""
    pixels = [denormalize(value.float(), **SCALE).clamp(0, 1) for value in (found, one.private.model_input)]
    side = one.leak.model.patch_size
    return [
        min(300.0, max(float(psnr_any_order(made[None], true[None], side)) for made in pixels[0])) for true in pixels[1]
    ]


def measure(breaching: ModuleType, cell: Cell, paths: list[Path], iterations: int) -> dict:
    """Return the scores of all attacks on the instances of a cell, and what an attack says that cannot read them."""
    scores: dict[str, list[float]] = {name: [] for name in ("mean_colour", "ours", *SHIPPED)}
    seconds, refused = dict.fromkeys(scores, 0.0), {}
    for place in range(cell.number):
        began = time.process_time()
        one, result = instance(cell, place, paths)
        seconds["ours"] += time.process_time() - began
        scores["ours"] += nearest(result.images, one)
        scores["mean_colour"] += mean_colour(denormalize(one.private.model_input.float(), **SCALE)).tolist()
        for name in SHIPPED:
            began = time.process_time()
            try:
                found = theirs(breaching, name, one, derive_seed(2, cell.key, place) % 2**31, iterations)
            except UserError as error:
                refused[name] = str(error)
                continue
            seconds[name] += time.process_time() - began
            scores[name] += nearest(found.nan_to_num(), one)
    found = {name: describe(values) for name, values in scores.items() if values}
    spent = {name: seconds[name] / cell.number for name in found if name != "mean_colour"}
    return {"attack": cell.attack, "n": cell.number * cell.images, "psnr": found, "seconds": spent, "refused": refused}


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--number", type=int, default=4, help="leaks of each condition (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=0, help="of breaching's attacks; 0: as shipped (default)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these conditions alone, such as 'one image'")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write, or to continue")
    args = parser.parse_args(argv)
    every = {cell.key: cell for cell in cells(args.number)}
    for name in args.only or ():
        if name not in every:
            raise UserError(f"--only: there is no condition '{name}': choose from {', '.join(every)}")
    breaching, paths = open_breaching(), list_images(args.images, 2000)
    settings = {"iterations": args.iterations, "number": args.number}
    found = read_results(args.output, "cells") if args.output.exists() else {**settings, "cells": {}}
    if any(found[key] != value for key, value in settings.items()):
        raise UserError(f"--output '{args.output}' holds results of other settings: choose another file")
    command = "python scripts/breaching_attacks.py --images DIR "
    command += f"--only {shlex.join(args.only)} " if args.only else ""
    command += f"--number {args.number} --iterations {args.iterations} --output FILE"
    found |= {"command": command, "breaching": version("breaching"), "torch": torch.__version__}
    chosen = [every[name] for name in args.only or every]
    for cell in track(chosen, len(chosen), "conditions", print):
        if cell.key not in found["cells"]:
            found["cells"][cell.key] = measure(breaching, cell, paths, args.iterations)
            print(cell.key, found["cells"][cell.key], flush=True)
            write_json(args.output, found)


if __name__ == "__main__":
    run_command(main)
