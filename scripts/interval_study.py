"""Are the certified intervals right? Random small instances under several defences, and how often one is wrong.

    python scripts/interval_study.py --images DIR --output docs/results/intervals.json

DIR: pictures (CIFAR-10). Every instance draws a ViT, its images and what the defence draws anew. Counted per cell:
instances that certify something, values outside their radius, instances with one at least, instances with more
certified bits than the upper bound; and, in `linear`, the mean squared error of the linear attack beside its Bayesian
Cramer-Rao bound, for Gaussian images and known noise. The file is written after every cell, and cells that it holds are
not measured again. Cost: 2 minutes of a core.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.certified import linear_mse
from attacks.threat_model.client import Client, Round
from attacks.threat_model.leak import Reconstruction
from campaigns.interval import excess, interval
from data.images import list_images, read_images
from defenses import build_defense
from eval.report import read_results
from models import build_model
from models.jigsaw import Jigsaw, patchify
from reports.charts import new_figure, open_axes
from utils.errors import UserError, run_command
from utils.files import write_atomic, write_json
from utils.progress import track
from utils.seeds import derive_seed
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.5, 0.45, 0.4), "std": (0.25, 0.24, 0.26)}
VICTIM = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
SMALL = VICTIM | {"image_size": 16, "depth": 3}  # 4 patches: room for batches
NOMINAL = 0.01  # share of the instances that claim something which may have a value outside its radius
COLORS = {"leaked": "#c2410c", "open": "#cbd5e1", "hidden": "#0f766e"}


@dataclass(frozen=True)
class Cell:
    """One row: what the client does, the attack, and how many instances."""

    key: str
    number: int
    attack: str = "closed_form"
    options: dict = field(default_factory=dict)
    model: dict = field(default_factory=lambda: dict(VICTIM))
    dtype: str = "float32"
    images: int = 1
    ratio: float = 0.0
    defense: str = "none"
    strength: dict = field(default_factory=dict)


def cells() -> Iterator[Cell]:
    """Return the cells: more than 1,000 instances of which an attack certifies something, and some of which none."""
    yield Cell("no defence", 250)
    for std, number in ((1e-6, 250), (1e-5, 250), (1e-4, 100), (1e-3, 10), (1e-2, 10), (1e-1, 20), (1.0, 20)):
        yield Cell(f"noise {std:g}", number, defense="noise", strength={"std": std})
    for z in (1e-4, 1e-2, 0.1, 1.0):
        yield Cell(f"DP-SGD z {z:g}", 20, defense="dp_sgd", strength={"clip": 1.0, "noise_multiplier": z})
    for ratio in (0.1, 0.5, 0.9):
        yield Cell(f"pruning {ratio:g}", 20, defense="prune", strength={"ratio": ratio})
    for bits in (16, 8, 1):
        yield Cell(f"{bits} bit{'s' * (bits > 1)}", 20, defense="quantize", strength={"bits": bits})
    hides = VICTIM | {"unknown": True}
    for ratio in (0.27, 0.5):
        yield Cell(f"MJP {ratio:g}, mjp_aware", 30, "mjp_aware", model=hides, ratio=ratio, dtype="float64")
        yield Cell(f"MJP {ratio:g}, joint", 30, "joint", model=hides, ratio=ratio, dtype="float64")
    withheld = {"defense": "withhold", "strength": {"names": "pos_embed"}, "dtype": "float64"}
    yield Cell("PE withheld", 60, "token_span", **withheld)
    for kind in ("none", "rotary"):
        yield Cell(f"positions {kind}", 30, "joint", model=SMALL | {"positions": kind}, dtype="float64")
    for number in (2, 3, 4):
        yield Cell(f"batch of {number}", 40, "joint", model=SMALL, images=number)


def instance(cell: Cell, place: int, paths: list[Path]) -> tuple[Round, Reconstruction]:
    """Return one random instance of a cell, and the attack on it."""
    seed = derive_seed(0, cell.key, place)
    model = build_model("vit", seed=seed % 2**31, **cell.model).to(getattr(torch, cell.dtype)).eval()
    jigsaw = Jigsaw(model.grid, cell.ratio, "uniform", seed=seed % 2**31)
    drawn = torch.randint(len(paths), (cell.images,), generator=torch.Generator().manual_seed(seed % 2**31))
    chosen = [paths[index] for index in drawn.tolist()]
    images = read_images(chosen, cell.model["image_size"], **SCALE).to(next(model.parameters()))
    terms = SCALE | {"reveal_labels": False, "withhold": ()}
    classes = {str(path.parent): number % 10 for number, path in enumerate(paths)}
    client = Client(model, jigsaw, build_defense(cell.defense, dict(cell.strength)), seed % 2**31, terms, classes)
    one = client.round(0, images, [str(path.parent) for path in chosen])
    try:
        return one, ATTACKS[cell.attack](one.leak, generator=one.generator, **cell.options)
    except UserError:  # nothing is left to read, as where all entries are rounded to zero
        return one, Reconstruction(torch.zeros_like(images))


def measure(cell: Cell, paths: list[Path]) -> dict:
    """Return what came of all instances of a cell."""
    rows, scale = [], torch.tensor(SCALE["std"]).double()
    began = time.process_time()
    for place in range(cell.number):
        one, result = instance(cell, place, paths)
        row = interval(one, result) | {"values": 0, "outside": 0, "furthest": 0.0}
        if result.certificate is not None and bool(result.certificate.claimed.any()):
            side = one.leak.model.patch_size
            truth = patchify(one.private.model_input, side).double()
            errors = excess(result.certificate, truth, scale.repeat_interleave(side**2))
            row |= {"values": errors.numel(), "outside": int((errors > 1).sum()), "furthest": float(errors.max())}
        rows.append(row)
    seconds = (time.process_time() - began) / cell.number
    mean = {key: statistics.fmean(row[key] for row in rows) for key in ("bits_leaked", "bits_hidden")}
    spread = {f"{key}_std": statistics.stdev(row[key] for row in rows) for key in mean}
    counts = {
        "claiming": sum(row["values"] > 0 for row in rows),
        "values": sum(row["values"] for row in rows),
        "values_outside": sum(row["outside"] for row in rows),
        "wrong": sum(row["outside"] > 0 for row in rows),
        "beyond": sum(row["bits_leaked"] > row["bits"] - row["bits_hidden"] + 1e-6 for row in rows),
        "furthest": max(row["furthest"] for row in rows),
    }
    return (
        {"attack": cell.attack, "n": cell.number, "bits": rows[0]["bits"], "seconds": seconds} | mean | spread | counts
    )


def linear(std: float, number: int) -> dict:
    """Return the mean squared error of the ridge regression of `closed_form` over its bound, on Gaussian images."""
    errors, bounds = [], []
    for place in range(number):
        seed = derive_seed(1, f"{std:g}", place) % 2**31
        generator = torch.Generator().manual_seed(seed)
        model = build_model("vit", seed=seed, **VICTIM).double().eval()
        images = torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)
        terms = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "reveal_labels": False}
        plain, noisy = (
            Client(model, Jigsaw(model.grid, 0.0), build_defense("noise", {"std": value}), seed, terms, {}).round(
                0, images, [""]
            )
            for value in (0.0, std)
        )
        found = ATTACKS["closed_form"](noisy.leak, generator=generator, noise=std)
        rows: Tensor = plain.leak.gradients["pos_embed"][0, 1:]
        errors.append(float((found.images - images).square().mean()))
        bounds.append(linear_mse(rows.T, std, 1.0))
    below = sum(error < bound for error, bound in zip(errors, bounds, strict=True))
    return {"n": number, "mse": statistics.fmean(errors), "bound": statistics.fmean(bounds), "below": below}


def draw(found: dict, path: Path) -> None:
    """Draw both bounds of every cell on one axis: proved leaked from the left, provably hidden from the right."""
    with open_axes():
        chart = new_figure(8.2, 0.27 * len(found) + 1.0)
        axes = chart.add_subplot()
        for place, row in enumerate(found.values()):
            leaked, hidden = (100 * row[name] / row["bits"] for name in ("bits_leaked", "bits_hidden"))
            lengths = {"leaked": leaked, "open": max(0.0, 100 - leaked - hidden), "hidden": hidden}
            start = 0.0
            for kind, length in lengths.items():
                axes.barh(place, length, left=start, color=COLORS[kind], height=0.72)
                start += length
            axes.text(101, place, row["attack"], va="center", fontsize=8, color="#64748b")
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the bits of an image (%)")
        names = {"leaked": "proved leaked", "open": "open", "hidden": "provably hidden, whatever the attack"}
        handles = [axes.barh(0, 0, color=color, label=names[kind]) for kind, color in COLORS.items()]
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
        write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=120, bbox_inches="tight"))


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write, or to continue")
    parser.add_argument("--figure", type=Path, help="PNG to draw of it")
    args = parser.parse_args(argv)
    paths = list_images(args.images, 2000)
    found = read_results(args.output, "cells", "linear") if args.output.exists() else {"cells": {}, "linear": {}}
    found["command"] = f"python scripts/interval_study.py --images {shlex.quote(args.images.name)} --output FILE"
    planned = list(cells())
    for cell in track(planned, len(planned), "cells", print):
        if cell.key not in found["cells"]:
            found["cells"][cell.key] = measure(cell, paths)
            write_json(args.output, found)
    for std in (1e-4, 1e-3, 1e-2, 1e-1):
        if f"{std:g}" not in found["linear"]:
            found["linear"][f"{std:g}"] = linear(std, 25)
    rows = found["cells"].values()
    total = {
        key: sum(row[key] for row in rows) for key in ("n", "claiming", "values", "values_outside", "wrong", "beyond")
    }
    found["total"] = total | {"nominal": NOMINAL}
    write_json(args.output, found)
    if args.figure:
        draw(found["cells"], args.figure)
    print(total)


if __name__ == "__main__":
    run_command(main)
