"""Membership by span from what clients share of a part of a ViT: heads, LoRA, and DP-SGD beside them.

    python scripts/membership_study.py --images DIR --others DIR --output docs/results/membership.json

--images: folder of members, --others: of 10,000 pictures or more that took no part (CIFAR-10 train and val). A head's
gradient is asked for features, LoRA's first matrix in the first block for the tokens of an image. Random weights, three
seeds. DP-SGD clips at 1; epsilon is of one update that every image takes part in, at delta 1e-5. Cost: 10 minutes of a
busy core.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.membership import distances, span_of
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import Leak
from data.images import list_images, read_images
from defenses.accounting import guarantee
from defenses.base import Defense
from defenses.dp_sgd import DpSgd
from eval.membership import auc, binomial_interval, tpr_at_fpr
from models import build_model
from models.jigsaw import Jigsaw
from models.partial import Head, Lora
from utils.errors import run_command
from utils.files import write_json
from utils.progress import track
from utils.statistics import describe
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
VIT = {"image_size": 32, "patch_size": 8, "num_heads": 4, "num_classes": 100, "embed_dim": 128, "depth": 2}
SEEDS, RATES, DELTA = (0, 1, 2), (1e-2, 1e-3, 1e-4), 1e-5
NOISE = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)  # multipliers of DP-SGD
LAYER, PARTS, RATIOS = "blocks.0.attn.qkv", ("lora", "head", "masked"), (0.5, 0.9)


def leak_of(model: nn.Module, images: Tensor, seed: int, defense: Defense | None = None, ratio: float = 0.0) -> Leak:
    """Return what one step on the images shares, masked by MJP at this ratio."""
    labels = torch.randint(100, (len(images),), generator=torch.Generator().manual_seed(seed))
    private = prepare(model, images, labels, Jigsaw(model.grid, ratio, "uniform", seed=seed), 0)
    generator = torch.Generator().manual_seed(seed)
    hook = partial((defense or Defense()).gradients, generator=generator)
    return share(model, private, hook, False, **SCALE)


def scores(members: Tensor, others: Tensor) -> dict:
    """Return AUC and true positive rates of distances, one value of each for a seed."""
    rates = {f"tpr_at_{rate:g}": tpr_at_fpr(members, others, rate)._asdict() for rate in RATES}
    gap = {"members_largest": float(members.max()), "others_smallest": float(others.min())}
    return {"auc": auc(members, others), **rates, **gap}


def joined(rows: list[dict]) -> dict:
    """Return the mean and spread over seeds, and the exact interval of the members of all seeds together."""
    told = {"auc": describe([row["auc"] for row in rows])}
    for key in (f"tpr_at_{rate:g}" for rate in RATES):
        told[key] = describe([row[key]["value"] for row in rows])
        hits = sum(round(row[key]["value"] * row[key]["n"]) for row in rows)
        low, high = binomial_interval(hits, sum(row[key]["n"] for row in rows))
        told[key] |= {"low": low, "high": high, "members": sum(row[key]["n"] for row in rows)}
    return told | {"members_largest": max(row["members_largest"] for row in rows)} | {
        "others_smallest": min(row["others_smallest"] for row in rows)}  # fmt: skip


def head_row(members: Tensor, others: Tensor, batch: int, noise: float = 0.0, ratio: float = 0.0) -> dict:
    """Return the row of a head, by batch size, noise of DP-SGD and mask ratio of MJP."""
    found = []
    for seed in SEEDS:
        model = Head().apply(build_model("vit", seed=seed, unknown=ratio > 0, **VIT).eval(), seed)
        own = members[seed * batch : (seed + 1) * batch]
        defense = DpSgd(clip=1.0, noise_multiplier=noise) if noise else None
        span = span_of(leak_of(model, own, seed, defense, ratio))
        found.append(scores(*(distances(span, model, some.split(500)) for some in (own, others))))
    epsilon = guarantee([[noise, 1.0, 1]], DELTA)["epsilon_shuffled"] if noise else None
    return {"batch": batch, "noise_multiplier": noise, "ratio": ratio, "epsilon": epsilon, **joined(found)}


def lora_row(members: Tensor, others: Tensor, rank: int, batch: int, ratio: float = 0.0) -> dict:
    """Return the row of LoRA's first matrix: the mean distance over all tokens of an image from its span."""
    found = []
    for seed in SEEDS:
        model = build_model("vit", seed=seed, unknown=ratio > 0, **VIT).eval()
        model = Lora(rank=rank, b_std=0.02).apply(model, seed)
        own = members[seed * batch : (seed + 1) * batch]
        span = span_of(leak_of(model, own, seed, ratio=ratio), LAYER)
        found.append(scores(*(distances(span, model, some.split(500)) for some in (own, others))))
    return {"rank": rank, "batch": batch, "ratio": ratio, "tokens": span.inputs, **joined(found)}


def studied(part: str, members: Tensor, others: Tensor) -> list[dict]:
    """Return the rows of a part: heads, LoRA, or heads and LoRA of steps that MJP masks, which the asker ignores."""
    if part == "head":
        cases = [(batch, 0.0) for batch in (8, 32, 64, 96)] + [(32, noise) for noise in NOISE[1:]]
        return [head_row(members, others, *case) for case in track(cases, len(cases), part, print)]
    if part == "lora":
        cases = ((8, 1), (32, 1), (64, 1), (64, 3), (96, 5), (96, 8))
        return [lora_row(members, others, *case) for case in track(cases, len(cases), part, print)]
    rows = [head_row(members, others, 32, ratio=ratio) for ratio in track(RATIOS, len(RATIOS), "head", print)]
    return rows + [lora_row(members, others, 64, 3, ratio) for ratio in track(RATIOS, len(RATIOS), "LoRA", print)]


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of members")
    parser.add_argument(
        "--others", type=Path, required=True, help="folder of at least 10,000 pictures that took no part"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--only", choices=PARTS, help="compute this part and take the others from --output")
    args = parser.parse_args(argv)
    members = read_images(list_images(args.images, 300), 32, **SCALE)
    others = read_images(list_images(args.others, 10_000), 32, **SCALE)
    command = "python scripts/membership_study.py --images DIR --others DIR --output FILE"
    told = {"command": command, "non_members": len(others), "seeds": len(SEEDS), "delta": DELTA}
    told |= json.loads(args.output.read_text()) if args.only else {}
    for part in [args.only] if args.only else PARTS:
        told[part] = studied(part, members, others)
        write_json(args.output, told)


if __name__ == "__main__":
    run_command(main)
