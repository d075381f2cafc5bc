"""Measure the joint attack on whole batches and whole masked images of photographs, in double and single precision.

    python scripts/joint_table.py --images DIR --output docs/results/joint_paper.json [--preset paper|equal|clients]
    python scripts/joint_table.py --images DIR --weights FILE --output docs/results/joint_trained.json --preset trained
    python scripts/joint_table.py --output docs/results/joint_claims.json --preset claims|mixtures

Random weights, one seed; labels hidden. Batches are taken in the order of the listing, spread over all of it. Each
measured batch is written at once, and not measured again. trained, half: also a trained ViT-S/14 with a random
classifier, weights of scripts/prepare_weights.py vit_small_patch14_saliency; half: gradients shared in 16 bits. claims:
small random victims on random pictures, none of them used while the attack was made, to see whether an error was ever
predicted too small; mixtures: the same on pictures whose patches are combinations of each other, or nearly equal.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import scipy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.exactness import CERTAIN
from attacks.joint.block import Places
from attacks.joint.joint import forms_of
from attacks.joint.search import batch_tokens
from attacks.threat_model.leak import Reconstruction, RefusalError
from eval.assignment import match_batch
from models.jigsaw import patchify
from scripts.joint_cases import Case, presets
from scripts.joint_victims import STD, victims
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.progress import track
from utils.statistics import finite
from utils.tool_parser import ToolParser

WEIGHTS = "vit_small_patch14_saliency"
LIMITS = (60.0, 55.0, 35.0)  # dB


def measure(case: Case, number: int, images: Path | None, weights: Path | None) -> dict:
    """Return what `joint` reaches on one batch: PSNR of patches (dB) as a set and in place, and what it says itself."""
    leak, private = victims(case, number, images, weights)
    began = time.process_time()
    found = ATTACKS["joint"](leak, generator=torch.Generator().manual_seed(0))
    seconds, size = time.process_time() - began, leak.model.patch_size
    true = patchify(private.model_input.double(), size)  # (B, N, P)
    placed = patchify(found.images[match_batch(found.images, private.model_input)], size)
    whole, several = true.flatten(0, 1), placed.flatten(0, 1)
    as_set, in_place = decibels_of_set(several, whole), decibels(several, whole)
    scores, hidden = {"set": as_set, "in_place": in_place}, private.mask.expand(len(true), -1).flatten()
    if case.mask_ratio:
        scores |= {"visible": in_place[~hidden], "hidden": as_set[hidden]}
    told = {key: value for key, value in found.diagnostics.items() if isinstance(value, int | float)}
    row = {"seconds": seconds} | told | overclaimed(found, true)
    for name, values in scores.items():
        row |= {f"{name}_min": float(values.min()), f"{name}_median": float(values.median())}
        row |= {f"{name}_above_{int(limit)}": float((values > limit).double().mean()) for limit in LIMITS}
    return finite(row)  # what an attack could not measure is infinite in its diagnostics


def overclaimed(found: Reconstruction, true: Tensor) -> dict:
    """Return how many patches the certificate of a result claims, how many of those lie outside its radius around every
    patch of the batch (B, N, P), normalised, and how far at most, in radii; nothing without a certificate."""
    if found.certificate is None:
        return {}
    scale = torch.tensor(STD, dtype=torch.float64).repeat_interleave(true.shape[2] // 3)
    patches, radius = found.certificate.patches.flatten(0, 1), found.certificate.radius.flatten()
    away = torch.stack([((true.flatten(0, 1) - patch) * scale).abs().amax(dim=1).amin() for patch in patches])
    claimed = found.certificate.claimed.flatten()
    furthest = float((away / radius)[claimed].max()) if bool(claimed.any()) else 0.0
    return {
        "certified": int(claimed.sum()),
        "overclaimed": int((away > radius)[claimed].sum()),
        "furthest": furthest,
    }


def decibels(found: Tensor, true: Tensor) -> Tensor:
    """Return the PSNR (n,) of patches (n, P) of pixels in range 1, at most 400 dB."""
    scale = torch.tensor(STD, dtype=torch.float64).repeat_interleave(true.shape[1] // 3)
    return -10 * ((found - true) * scale).square().mean(dim=1).clamp_min(1e-40).log10()


def decibels_of_set(found: Tensor, true: Tensor) -> Tensor:
    """Return the PSNR (n,) of each true patch (n, P) in the pairing with found ones (n, P) that has the largest sum of
    them; one of least squared error gives exact patches away to bring a wrong one nearer."""
    apart = torch.stack([decibels(found, patch[None]) for patch in true])  # (n, n)
    rows, columns = scipy.optimize.linear_sum_assignment(apart.numpy(), maximize=True)
    return apart[rows, columns]


def claims(case: Case, number: int, images: Path | None, weights: Path | None = None) -> dict:
    """Return how many patches were claimed found, and the largest error of one, over what was predicted for it."""
    leak, private = victims(case, number, images, weights)
    places = Places.of(leak)
    tokens, rows, _ = batch_tokens(leak, forms_of(leak, places), places, torch.Generator().manual_seed(0))
    true = patchify(private.model_input.double(), leak.model.patch_size)  # (B, N, P)
    wrong = (tokens.patches[:, None] - true[:, rows].transpose(0, 1)).square().mean(dim=2).sqrt().amin(dim=1)
    sure = tokens.error * max(STD) < CERTAIN
    ratios = (wrong / tokens.error)[sure]
    return {
        "patches": true.shape[0] * true.shape[1],
        "claimed": int(sure.sum()),
        "worst": float(ratios.max()) if len(ratios) else 0.0,
        "over_10": int((ratios > 10).sum()),
        "median": float(ratios.median()) if len(ratios) else 0.0,
    }


def mixtures(case: Case, number: int, images: Path | None, weights: Path | None) -> dict:
    """Return what is certified of one batch, and how far it is off: the certificate's part of `measure`."""
    try:
        row = measure(case, number, images, weights)
    except RefusalError:  # hidden patches that are all equal: nothing is claimed of them
        row = {"certified": 0, "overclaimed": 0, "furthest": 0.0}
    return {key: row[key] for key in ("patches", "tokens", "certified", "overclaimed", "furthest") if key in row}


INVENTED = {"claims": claims, "mixtures": mixtures}  # presets without photographs, and what is measured of them


def summary(rows: list[dict]) -> dict:
    """Return n, and mean, sample standard deviation and extremes of every number over the batches that have it."""
    found = {"n": len(rows)}
    for key in rows[0]:
        numbers = [float(row[key]) for row in rows if row.get(key) is not None]
        if not numbers:
            continue
        values = torch.tensor(numbers, dtype=torch.float64)
        spread = float(values.std()) if len(numbers) > 1 else 0.0
        extremes = {"min": float(values.min()), "max": float(values.max())}
        found[key] = {"mean": float(values.mean()), "std": spread} | extremes
    return found


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--weights", type=Path, help="file of the trained ViT-S/14, for trained and half")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; batches that are in it are kept")
    choices = "paper, trained: two hours of a core; half: an hour; mixtures: a quarter; others: some minutes"
    parser.add_argument("--preset", choices=sorted(presets()), default="paper", help=choices)
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    parser.add_argument("--batches", type=int, default=20, help="at most so many batches of a case")
    options = parser.parse_args()
    if options.preset not in INVENTED and options.images is None:
        raise UserError(f"--preset {options.preset} needs --images: a folder of photographs")
    cases = {name: case for name, case in presets()[options.preset].items() if options.only in name}
    if not cases:
        raise UserError(f"--only {options.only}: no case of --preset {options.preset} contains it")
    if options.weights is None and any(case.trained for case in cases.values()):
        raise UserError(f"--preset {options.preset} needs --weights: of scripts/prepare_weights.py {WEIGHTS}")
    images = None if options.preset in INVENTED else options.images
    batches = json.loads(options.output.read_text())["batches"] if options.output.exists() else {}
    command = f"python scripts/joint_table.py --preset {options.preset}" + " --images PHOTOGRAPHS" * bool(images)
    command += " --weights FILE" * bool(options.weights)
    work = [
        (name, number)
        for number in range(options.batches)  # the first batch of every case, then the second
        for name, case in cases.items()
        if len(batches.get(name, [])) <= number < case.batches
    ]
    for name, number in track(work, len(work), "joint", print):
        done = batches.setdefault(name, [])
        done.append(INVENTED.get(options.preset, measure)(cases[name], number, images, options.weights))
        told = {
            key: asdict(case) | summary(batches[key])
            for key, case in presets()[options.preset].items()
            if batches.get(key)
        }
        write_json(options.output, {"command": command, "cases": told, "batches": batches})


if __name__ == "__main__":
    run_command(main)
