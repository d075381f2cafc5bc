"""How strong must DP-SGD's noise be against each attack? PSNR and certified bits against the accountant's epsilon.

    python scripts/epsilon_curves.py --images DIR --output docs/results/epsilon.json --figure docs/figures/epsilon.png

DIR: pictures by class (CIFAR-10). A client shares one update of one image, clipped at 1 and noised; epsilon is exact
for one Gaussian mechanism, at delta 1e-5. Victims: random ViTs at 32 pixels, one for each seed; `mjp_aware` attacks one
that masks half of its patches. A file is written after every cell, and cells that it holds are not measured again.
Cost: 6 minutes of a core.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS, attack_together
from attacks.threat_model.client import Client, Round
from attacks.threat_model.leak import Reconstruction
from campaigns.scoring import score_round
from data.images import list_images, read_images
from defenses import build_defense
from defenses.accounting import guarantee
from eval.report import read_results
from models import build_model
from models.jigsaw import Jigsaw
from reports.charts import COLORS, new_figure, open_axes
from reports.tables import Measured, Table, markdown
from utils.errors import UserError, run_command
from utils.files import write_atomic, write_json
from utils.progress import track
from utils.statistics import describe
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
VICTIM = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10}
SEEDS, IMAGES, DELTA, CLIP = (0, 1, 2), 4, 1e-5, 1.0
NOISE = (4.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # multipliers
MATCHING = {"init": "zeros", "signed": "none", "schedule": "cosine", "lr": 0.05, "tv": 0.1, "iterations": 60}
KINDS = ("closed_form", "closed_form, told", "mjp_aware", "defense_aware", "inverting_gradients")
TITLES = ("how close attacks come", "what is proved")


def options_of(kind: str, z: float) -> tuple[str, dict]:
    """Return the attack of a kind and its options against noise z."""
    if kind == "closed_form, told":
        return "closed_form", {"noise": z * CLIP}
    if kind == "defense_aware":
        told = {"clip": CLIP, "noise_multiplier": z}
        return kind, {"defense": "dp_sgd", "defense_options": told, "iterations": 50}
    return kind, MATCHING if kind == "inverting_gradients" else {}


def rounds_of(kind: str, z: float, seed: int, paths: list[Path]) -> list[Round]:
    """Return the rounds of one seed: IMAGES images of different classes, a victim and noise of its own."""
    ratio = 0.5 if kind == "mjp_aware" else 0.0
    model = build_model("vit", seed=seed, unknown=ratio > 0, **VICTIM).eval()
    defense = build_defense("dp_sgd", {"clip": CLIP, "noise_multiplier": z})
    classes = {str(path.parent): place % 10 for place, path in enumerate(paths)}
    client = Client(
        model, Jigsaw(model.grid, ratio, seed=seed), defense, seed, SCALE | {"reveal_labels": True}, classes
    )
    chosen = [paths[(place * len(SEEDS) + seed) % len(paths)] for place in range(IMAGES)]
    images = read_images(chosen, 32, **SCALE)
    return [client.round(place, images[place : place + 1], [str(chosen[place].parent)]) for place in range(IMAGES)]


def measure(kind: str, z: float, paths: list[Path]) -> dict:
    """Return the scores of a cell: means over the images of a seed, and mean and spread of these over seeds."""
    name, options = options_of(kind, z)
    seeds, why, began = [], "", time.process_time()
    for seed in SEEDS:
        rounds = rounds_of(kind, z, seed, paths)
        try:
            results = attack_together(ATTACKS[name], rounds, None, options) if "matching" in name else [
                ATTACKS[name](one.leak, generator=one.generator, **options) for one in rounds]  # fmt: skip
        except UserError as error:  # nothing that the attack can start from: a grey picture
            why = str(error)
            results = [Reconstruction(torch.zeros_like(one.private.images)) for one in rounds]
        rows = [row for one, result in zip(rounds, results, strict=True) for row in score_round(one, result, {})[1]]
        seeds.append({key: statistics.fmean(row[key] for row in rows) for key in
                      ("psnr", "psnr_patches", "psnr_baseline", "bits_leaked", "bits_hidden", "bits")})  # fmt: skip
    found = {key: describe([seed[key] for seed in seeds]) for key in seeds[0]}
    return {"n": IMAGES, "why": why, "seconds": time.process_time() - began} | found


def draw(found: dict, path: Path) -> None:
    """Draw PSNR against epsilon, and beside it the certified bits under the bound."""
    with open_axes():
        chart = new_figure(10.4, 4.2)
        one, other = chart.subplots(1, 2)
        for color, kind in zip(COLORS, KINDS, strict=False):
            cells = [cell for cell in found["cells"].values() if cell["attack"] == kind]
            places = [cell["epsilon"] for cell in cells]
            best = [cell["psnr_patches"] for cell in cells]
            spread = [row["std"] for row in best]
            one.errorbar(places, [row["mean"] for row in best], yerr=spread, color=color, marker="o", markersize=4,
                         capsize=2, label=kind)  # fmt: skip
            if any(cell["bits_leaked"]["mean"] for cell in cells):
                share = [100 * cell["bits_leaked"]["mean"] / cell["bits"]["mean"] for cell in cells]
                other.plot(places, share, color=color, marker="o", markersize=4, label=f"proved leaked: {kind}")
        cells = [cell for cell in found["cells"].values() if cell["attack"] == KINDS[0]]
        bound = [100 * (1 - cell["bits_hidden"]["mean"] / cell["bits"]["mean"]) for cell in cells]
        places = [cell["epsilon"] for cell in cells]
        other.fill_between(places, bound, 100, color="#0f766e", alpha=0.25, label="provably hidden from all")
        level = statistics.fmean(cell["psnr_baseline"]["mean"] for cell in cells)
        one.axhline(level, color="#64748b", linestyle=":", label="mean colour, no leak")
        one.set(ylabel="PSNR, patches in any order (dB)", ylim=(0, 70))
        other.set(ylabel="share of the bits of an image (%)", ylim=(0, 102))
        for axes, title in zip((one, other), TITLES, strict=True):
            axes.set(xscale="log", xlabel="epsilon of one update (delta 1e-5)")
            axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axes.axvspan(1, 10, color="#e2e8f0", zorder=0, label="epsilon 1 to 10")
            axes.legend(frameon=False, fontsize=8, loc="upper left" if axes is one else "center right")
        write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=120, bbox_inches="tight"))


def table(found: dict) -> str:
    """Return the cells as Markdown: PSNR in any order by attack, and what is proved."""
    lines = []
    for z in NOISE:
        own = {kind: found["cells"][f"{kind} | {z:g}"] for kind in KINDS}
        first = own[KINDS[0]]
        scores = [Measured(cell["psnr_patches"]["mean"], cell["psnr_patches"]["std"]) for cell in own.values()]
        leaked, hidden = (100 * first[key]["mean"] / first["bits"]["mean"] for key in ("bits_leaked", "bits_hidden"))
        lines.append([f"{first['epsilon']:.2g}", *scores, Measured(leaked), Measured(hidden)])
    return markdown(Table(["epsilon", *KINDS, "proved leaked (%)", "hidden (%)"], lines))


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures, by class")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write, or to continue")
    parser.add_argument("--figure", type=Path, help="PNG to draw of it")
    args = parser.parse_args(argv)
    every = list_images(args.images)
    paths = every[:: max(1, len(every) // (IMAGES * len(SEEDS)))][: IMAGES * len(SEEDS)]
    command = "python scripts/epsilon_curves.py --images DIR --output FILE"
    found = (
        read_results(args.output, "cells")
        if args.output.exists()
        else {"command": command, "delta": DELTA, "cells": {}}
    )
    planned = [(kind, z) for kind in KINDS for z in NOISE]
    for kind, z in track(planned, len(planned), "cells", print):
        key = f"{kind} | {z:g}"
        if key not in found["cells"]:
            epsilon = guarantee([[z, 1.0, 1]], DELTA)["epsilon_shuffled"]
            found["cells"][key] = {"attack": kind, "noise_multiplier": z, "epsilon": epsilon} | measure(kind, z, paths)
            write_json(args.output, found)
    if args.figure:
        draw(found, args.figure)
    print(table(found))


if __name__ == "__main__":
    run_command(main)
