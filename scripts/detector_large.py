"""What the detector says of larger models than those its thresholds come from: false alarms and attacks.

    python scripts/detector_large.py --images DIR --weights FILE --work DIR --output docs/results/detector_large.json

Honest models: ViT-S/14 of timm's shape (22 million parameters, 98 px), random and with the trained weights of FILE
(docs/weights.md), each after rounds of a short fine-tuning on --images, an image folder by class, at the learning rates
of RATES. Two neighbouring rounds are what a client compares. The servers change the last random model of the highest
rate, at the three strengths of scripts/detector_study.py. Statistics of weights alone. Cost: 20 minutes of a busy core.
Resumable: rows are kept in --work.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.malicious import SERVERS
from attacks.malicious.server import Knowledge
from attacks.threat_model.victim import build_victim
from data.images import list_images, read_images
from defenses.detector import THRESHOLDS, layer_statistics, weight_statistics
from scripts.detector_study import TAMPERED, area
from utils.errors import run_command
from utils.files import write_json
from utils.progress import track
from utils.tool_parser import ToolParser

SIDE, SCALE = 98, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ROUNDS, STEPS, BATCH, RATES = 3, 1, 8, (1e-5, 1e-3)
SEEDS = (0,)


def trained(weights: str | None, rate: float, seed: int, images: Tensor, labels: Tensor) -> Iterator[nn.Module]:
    """Yield the model before its first round and after each; Adam, all from the seed."""
    options = {"num_classes": 10, "unknown": True}
    if weights:
        model = build_victim(weights, None, seed=seed, image_size=SIDE, **options)
    else:
        model = build_victim(None, "deit_small", seed=seed, image_size=SIDE, patch_size=14, **options)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    yield model.eval()
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        yield model


def rows_of(weights: str | None, rate: float, seed: int, images: Tensor, labels: Tensor) -> list[dict]:
    """Return the rows of one training: its honest rounds, and what each server makes of its last model."""
    about = {"weights": "trained" if weights else "random", "rate": rate, "seed": seed}
    rows, before, known, models = [], None, None, trained(weights, rate, seed, images, labels)

    def row(model: nn.Module, attack: str, strength: int) -> dict:
        after = {name: value.detach() for name, value in model.state_dict().items()}
        found = {name: value for name, (value, _) in weight_statistics(after, before, known).items()}
        return about | {"attack": attack, "strength": strength} | found

    for number, model in enumerate(models):
        if before is not None:
            rows.append(row(model, "", 0))
            if number == ROUNDS:
                break
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        known = layer_statistics(before)
    if weights or rate < max(RATES):
        return rows
    knowledge = Knowledge((3, SIDE, SIDE), *SCALE, images)
    for attack, strengths in TAMPERED.items():
        for strength, (server, options) in enumerate(strengths):
            if server == "adapter_imprint":  # this model has no adapters
                continue
            generator = torch.Generator().manual_seed(seed)
            sent = SERVERS[server](**options).tamper(model.eval(), knowledge, generator=generator)
            rows.append(row(sent, attack, strength))
    return rows


def score(row: dict, thresholds: dict[str, float]) -> float:
    """Return how far the worst statistic lies above its threshold; positive is an alarm."""
    return max(row[key] - limit for key, limit in thresholds.items() if key in row)


def summarized(rows: list[dict]) -> dict:
    """Return false alarms and, by attack and strength, what is detected, at the thresholds of defenses/detector.py."""
    honest = [row for row in rows if not row["attack"]]
    told: dict = {"honest": {}, "attacks": []}
    for kind in ("random", "trained"):
        mine = [row for row in honest if row["weights"] == kind]
        alarms = sum(score(row, THRESHOLDS) > 0 for row in mine)
        told["honest"][kind] = {"n": len(mine), "false_alarms": alarms}
    told["honest"]["by"] = {
        key: sum(row.get(key, limit) > limit for row in honest) for key, limit in THRESHOLDS.items()
    }
    clean = np.array([score(row, THRESHOLDS) for row in honest])
    for attack, strengths in TAMPERED.items():
        for strength, (_, options) in enumerate(strengths):
            own = [row for row in rows if (row["attack"], row["strength"]) == (attack, strength)]
            if not own:
                continue
            got = np.array([score(row, THRESHOLDS) for row in own])
            shown = {key: value for key, value in options.items() if key not in ("target", "expected_images")}
            told["attacks"].append(
                {"attack": attack, "strength": ", ".join(f"{key} {value}" for key, value in shown.items())}
                | {"n": len(got), "detected": int((got > 0).sum()), "auc": area(clean, got)}
            )
    return told


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="image folder by class, of ten classes")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the ViT-S/14 (docs/weights.md)")
    parser.add_argument("--most", type=int, help="stop after so many new trainings; a second call continues")
    parser.add_argument("--work", type=Path, required=True, help="folder of the rows; a second call continues")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(argv)
    paths = list_images(args.images, 128)
    names = sorted({path.parent.name for path in paths})
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    images = read_images(paths, SIDE, *SCALE)
    args.work.mkdir(parents=True, exist_ok=True)
    cells = [(weights, rate, seed) for seed in SEEDS for weights in (None, str(args.weights)) for rate in RATES]
    rows, new = [], 0
    for weights, rate, seed in track(cells, len(cells), "trainings", print):
        file = args.work / f"{'trained' if weights else 'random'}-{rate:g}-{seed}.json"
        if not file.exists():
            if args.most is not None and (new := new + 1) > args.most:
                return
            write_json(file, rows_of(weights, rate, seed, images, labels))
        rows += json.loads(file.read_text())
    command = "python scripts/detector_large.py --images DIR --weights FILE --work DIR --output FILE"
    write_json(args.output, {"command": command, "parameters": 22_000_000, "rounds": ROUNDS} | summarized(rows))
    print(f"{args.output}: {sum(not row['attack'] for row in rows)} honest models")


if __name__ == "__main__":
    run_command(main)
