"""Membership by span from what clients share of a part of a ViT: heads, LoRA, and DP-SGD beside them.

    python scripts/membership_study.py --images DIR --others DIR --output docs/results/membership.json

--images: folder of members, --others: of 10,000 pictures or more that took no part (CIFAR-10 train and val). A head's
gradient is asked for features, LoRA's first matrix in the first block for the tokens of an image. Random weights, three
seeds. DP-SGD clips at 1; epsilon is of one update that every image takes part in, at delta 1e-5.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.threat_model.client import prepare, share
from data.images import list_images, read_images
from defenses.accounting import guarantee
from defenses.base import Defense
from defenses.dp_sgd import DpSgd
from eval.membership import auc, binomial_interval, span_distances, tpr_at_fpr
from models import build_model
from models.jigsaw import Jigsaw
from models.partial import Head, Lora
from utils.errors import run_command
from utils.files import write_json
from utils.statistics import describe
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
VIT = {"image_size": 32, "patch_size": 8, "num_heads": 4, "num_classes": 100, "embed_dim": 128, "depth": 2}
SEEDS, RATES, DELTA = (0, 1, 2), (1e-2, 1e-3, 1e-4), 1e-5
NOISE = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)  # multipliers of DP-SGD
LAYER = "blocks.0.attn.qkv"


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the head reads and a one, (M, D + 1)."""
    found = torch.cat([model.features(some) for some in images.split(500)])
    return nn.functional.pad(found, (0, 1), value=1.0)


@torch.no_grad()
def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return what queries, keys and values of the first block read, (M, T, D)."""
    tokens = model._pos_embed(model.patch_embed(images))
    return model.blocks[0].norm1(tokens)


def leak_of(model: nn.Module, images: Tensor, seed: int, defense: Defense | None = None) -> dict[str, Tensor]:
    """Return what one step on the images shares."""
    labels = torch.randint(100, (len(images),), generator=torch.Generator().manual_seed(seed))
    private = prepare(model, images, labels, Jigsaw(model.grid, 0.0, seed=seed), 0)
    generator = torch.Generator().manual_seed(seed)
    hook = partial((defense or Defense()).gradients, generator=generator)
    return share(model, private, hook, False, **SCALE).gradients


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


def head_rows(members: Tensor, others: Tensor) -> list[dict]:
    """Return the rows of heads, by batch size and noise."""
    rows = []
    cases = [(batch, 0.0) for batch in (8, 32, 64, 96)] + [(32, noise) for noise in NOISE[1:]]
    for batch, noise in cases:
        found = []
        for seed in SEEDS:
            model = Head().apply(build_model("vit", seed=seed, **VIT).eval(), seed)
            own = members[seed * batch : (seed + 1) * batch]
            defense = DpSgd(clip=1.0, noise_multiplier=noise) if noise else None
            leak = leak_of(model, own, seed, defense)
            matrix = torch.cat([leak["head.weight"], leak["head.bias"][:, None]], dim=1)
            distances = (span_distances(matrix, features_of(model, some), batch) for some in (own, others))
            found.append(scores(*distances))
        epsilon = guarantee([[noise, 1.0, 1]], DELTA)["epsilon_shuffled"] if noise else None
        rows.append({"batch": batch, "noise_multiplier": noise, "epsilon": epsilon, **joined(found)})
        print(rows[-1], flush=True)
    return rows


def lora_rows(members: Tensor, others: Tensor) -> list[dict]:
    """Return the rows of LoRA's first matrix, by rank and batch size: all tokens of an image must lie in its span."""
    rows = []
    for rank, batch in ((8, 1), (32, 1), (64, 1), (64, 3), (96, 5), (96, 8)):
        found = []
        for seed in SEEDS:
            model = Lora(rank=rank, b_std=0.02).apply(build_model("vit", seed=seed, **VIT).eval(), seed)
            own = members[seed * batch : (seed + 1) * batch]
            matrix = leak_of(model, own, seed)[f"{LAYER}.lora_a"]  # (rank, D)
            tokens = batch * (model.grid[0] * model.grid[1] + 1)
            distances = []
            for some in (own, others):
                each = [
                    span_distances(matrix, tokens_of(model, part).flatten(0, 1), min(tokens, rank)).unflatten(
                        0, (len(part), -1)
                    )
                    for part in some.split(500)
                ]
                distances.append(torch.cat(each).mean(dim=1))
            found.append(scores(*distances))
        rows.append({"rank": rank, "batch": batch, "tokens": tokens, **joined(found)})
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of members")
    parser.add_argument(
        "--others", type=Path, required=True, help="folder of at least 10,000 pictures that took no part"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(argv)
    members = read_images(list_images(args.images, 300), 32, **SCALE)
    others = read_images(list_images(args.others, 10_000), 32, **SCALE)
    command = "python scripts/membership_study.py --images DIR --others DIR --output FILE"
    told = {"command": command, "non_members": len(others), "seeds": len(SEEDS), "delta": DELTA}
    write_json(args.output, told | {"lora": lora_rows(members, others), "head": head_rows(members, others)})


if __name__ == "__main__":
    run_command(main)
