"""Images of a batch that the gradient of its classifier gives away: features, logits and labels.

    python scripts/class_features_study.py --images DIR --output docs/results/class_features.json

Features of photographs in a random DeiT-Ti/16 (192 of them, 1000 classes) behind three heads: its own; its own with the
weight scaled until probabilities reach 0.999; one trained on the photographs' features (L-BFGS, 150 steps, a class of
its own for each photograph), on photographs it was trained on and on others. Labels are hidden. Error: of a feature,
relative to its length; false: claimed with another label, or further off than 10 times what was predicted. Cost: 3
minutes of a core.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.class_features import class_features
from data.images import list_images, read_images
from models import build_model
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.statistics import describe
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ROUNDING = 1e-9  # relative error that no prediction has to name
CASES = {  # head, images of a batch, precision, photographs of each label, copies of each photograph
    "random head": ("random", 64, torch.float64, 1, 1),
    "random head, float32": ("random", 64, torch.float32, 1, 1),
    "random head, two of each label": ("random", 64, torch.float64, 2, 1),
    "random head, four of each label": ("random", 64, torch.float64, 4, 1),
    "random head, every photograph twice": ("random", 64, torch.float64, 1, 2),
    "random head times 30": ("times 30", 16, torch.float64, 1, 1),
    "random head times 30, 64": ("times 30", 64, torch.float64, 1, 1),
    "random head times 100": ("times 100", 16, torch.float64, 1, 1),
    "random head times 100, 64": ("times 100", 64, torch.float64, 1, 1),
    "trained head, its photographs": ("trained", 16, torch.float64, 0, 1),
    "trained head, its photographs, 64": ("trained", 64, torch.float64, 0, 1),
    "trained head, others": ("others", 16, torch.float64, 1, 1),
    "trained head, others, 64": ("others", 64, torch.float64, 1, 1),
    "trained head, others, float32": ("others", 16, torch.float32, 1, 1),
}


@torch.no_grad()
def features_of(model: nn.Module, paths: list[Path]) -> Tensor:
    """Return what the classifier is given for the photographs (n, F), in float32."""
    batches = [read_images(paths[start : start + 20], 224, **SCALE) for start in range(0, len(paths), 20)]
    return torch.cat([model.forward_head(model.forward_features(images), pre_logits=True) for images in batches])


def trained(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear classifier fitted to features (n, F), standardised while it is fitted."""
    mean, std = features.mean(dim=0), features.std(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(features.shape[1], classes).double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer((features - mean) / std), labels)
        (loss + 1e-5 * layer.weight.square().sum()).backward()
        return loss

    optimizer.step(step)
    weight = (layer.weight / std).detach()
    return weight, (layer.bias - weight @ mean).detach()


def measure(features: Tensor, labels: Tensor, head: tuple[Tensor, Tensor], dtype: torch.dtype, seed: int) -> dict:
    """Return what comes of one batch: features (B, F), labels (B,)."""
    features, (weight, bias), number = features.to(dtype), (value.to(dtype) for value in head), len(labels)
    probabilities = (features @ weight.T + bias).softmax(dim=1)
    excess = (probabilities - nn.functional.one_hot(labels, len(bias))) / number
    began = time.process_time()
    own = torch.Generator().manual_seed(seed)
    found = class_features(excess.T @ features, excess.sum(dim=0), (weight, bias), number, generator=own)
    seconds = time.process_time() - began
    apart = torch.cdist(found.features, features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart / features.double().norm(dim=1)
    error = apart.masked_fill(found.labels[:, None] != labels, torch.inf).amin(dim=1)
    false = int((error > 10 * found.error + ROUNDING).sum())
    row = {"found": found.found, "complete": found.complete, "false": false, "seconds": seconds}
    return row | {"error": error.max().item() if len(error) else None, "largest": probabilities.max().item()}


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", required=True, help="folder of at least 400 photographs")
    parser.add_argument("--batches", type=int, default=3, help="batches of every case (default: 3)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    paths = list_images(given.images)
    if len(paths) < 400:
        raise UserError(f"'{given.images}' holds {len(paths)} photographs, 400 are wanted")
    torch.set_num_threads(1)
    model = build_model("deit_tiny", seed=0, num_classes=1000, image_size=224).eval()
    features, weight, bias = features_of(model, paths[:400]), model.head.weight.detach(), model.head.bias.detach()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))  # labels of photographs
    own = trained(features[:300].double(), order[:300], 1000)
    heads = {"random": (weight, bias), "trained": own, "others": own}
    heads |= {f"times {factor}": (factor * weight, bias) for factor in (30, 100)}
    cases = {}
    for name, (head, number, dtype, repeats, copies) in CASES.items():
        rows = []
        for batch in range(given.batches):
            pool = torch.arange(300, 400) if head == "others" else torch.arange(300)
            drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(batch))[: number // copies]
            chosen = pool[drawn].repeat_interleave(copies)
            labels = order[chosen] if head in ("trained", "others") or copies > 1 else order[:number]
            labels = labels[: number // repeats].repeat_interleave(repeats) if repeats > 1 else labels
            rows.append(measure(features[chosen], labels, heads[head], dtype, batch))
        case = {"images": number, "batches": len(rows), "complete": sum(row["complete"] for row in rows)}
        case |= {key: describe([row[key] for row in rows]) for key in ("found", "seconds", "largest")}
        case |= {"false": sum(row["false"] for row in rows), "error": max(row["error"] or 0 for row in rows)}
        cases[name] = case
        print(f"{name}: {case['found']['mean']:.1f} of {number}, error at most {case['error']:.1e}, "
              f"false {case['false']}, {case['seconds']['mean']:.1f} s", flush=True)  # fmt: skip
    command = f"python scripts/class_features_study.py --images DIR --batches {given.batches}"
    write_json(given.output, {"command": command, "cases": cases})


if __name__ == "__main__":
    run_command(main)
