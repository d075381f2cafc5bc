"""How well defenses/detector.py tells tampered models from honest ones: false alarms, ROC per attack and strength.

    python scripts/detector_study.py --train DIR --images DIR --work DIR --output docs/results/detector.json

DIR of --train and --images: image folders by class (CIFAR-10). Honest models are those of two neighbouring rounds of
short trainings, five architectures and several seeds; half of the seeds set the scale of the statistics, the other half
are measured. A score is the largest statistic in units of its honest range. Cost: 35 minutes of a busy core. Resumable:
rows are kept in --work.
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
from data.images import list_images, read_images
from defenses.detector import gradient_statistics, weight_statistics
from models import build_model
from models.jigsaw import Jigsaw, shuffle_patches
from models.partial import Adapters, head_of
from utils.errors import run_command
from utils.files import write_json
from utils.progress import track
from utils.tool_parser import ToolParser

SCALE = ((0.5,) * 3, (0.5,) * 3)
SHAPE = {"image_size": 32, "patch_size": 8, "num_heads": 3, "num_classes": 10, "embed_dim": 48}
ARCHITECTURES = {
    "vit": ("vit", SHAPE | {"depth": 2}),
    "vit_mjp": ("vit", SHAPE | {"depth": 2, "unknown": True}),
    "vit_adapters": ("vit", SHAPE | {"depth": 3}),
    "convnet": ("convnet", {"num_classes": 10, "width": 4}),
    "lenet": ("lenet", {"num_classes": 10}),
}
ROUNDS, STEPS, BATCH, RATE, PROBE = 6, 10, 32, 1e-3, 16
RANK, RATIO = 24, 0.27
TAMPERED = {  # by attack: (server, options) at three strengths, the weakest first
    "imprint": [("imprint", {"bins": 256, "disguise": d}) for d in (20.0, 3.0, 0.0)],
    "trap weights": [("trap_weights", {"rows": n}) for n in (16, 64, 256)],
    "class fishing": [
        ("class_fishing", {"target": 3, "margin": m, "kept": k}) for m, k in ((10.0, 0.5), (20.0, 0.1), (1000.0, 0.0))
    ],
    "feature fishing": [
        ("feature_fishing", {"target": 3, "expected_images": PROBE, "slope": m, "kept": k})
        for m, k in ((3.0, 0.5), (30.0, 0.1), (3000.0, 0.0))
    ],
    "adapter bins": [("adapter_imprint", {"gain": g}) for g in (1e-5, 1e-3, 1e-1)],
}
NEW = "new_values"
ABOUT = ("architecture", "seed", "round", "attack", "strength")  # of a row


def trained(name: str, seed: int, images: Tensor, labels: Tensor) -> Iterator[nn.Module]:
    """Yield the model of a training before its first round and after each; Adam, all from the seed."""
    kind, options = ARCHITECTURES[name]
    model = build_model(kind, seed=seed, **options)
    if name == "vit_adapters":
        model = Adapters(rank=RANK, train_head=True).apply(model, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=RATE)
    jigsaw = Jigsaw(model.grid, RATIO, "uniform", seed=seed) if getattr(model, "hides_positions", False) else None
    yield model.eval()
    for _ in range(ROUNDS):
        model.train()
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            optimizer.zero_grad()
            inputs: tuple[Tensor, ...] = (images[chosen],)
            if jigsaw:
                mask, source = jigsaw.draw()
                inputs = shuffle_patches(images[chosen], source, model.patch_size), mask
            nn.functional.cross_entropy(model(*inputs), labels[chosen]).backward()
            optimizer.step()
        yield model.eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def measured(model: nn.Module, before: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the statistics of a model that a client receives, beside the one of the round before."""
    found = weight_statistics(weights_of(model), before)
    found |= gradient_statistics(model, images, labels, head_of(model))
    return {name: value for name, (value, _) in found.items()}


def rows_of(name: str, seed: int, train: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> list[dict]:
    """Return the rows of one training: its honest rounds, and what each server makes of its last model."""
    rows, before, models = [], None, trained(name, seed, *train)
    probe = torch.randperm(len(own[0]), generator=torch.Generator().manual_seed(seed))[:PROBE]
    images, labels = own[0][probe], own[1][probe]
    for number, model in enumerate(models):
        if before is not None:
            about = {"architecture": name, "seed": seed, "round": number}
            rows.append(about | {"attack": "", "strength": 0} | measured(model, before, images, labels))
            if number == ROUNDS:
                break
        before = weights_of(model)
    knowledge = Knowledge((3, 32, 32), *SCALE, train[0])
    for attack, strengths in TAMPERED.items():
        if (attack == "adapter bins") != (name == "vit_adapters"):
            continue
        for strength, (server, options) in enumerate(strengths):
            generator = torch.Generator().manual_seed(seed)
            sent = SERVERS[server](**options).tamper(model, knowledge, generator=generator)
            rows.append(
                {"architecture": name, "seed": seed, "round": ROUNDS, "attack": attack, "strength": strength}
                | measured(sent, before, images, labels)
            )
    return rows


def scores(rows: list[dict], scale: dict[str, tuple[float, float]]) -> np.ndarray:
    """Return the largest statistic of each row, 0 at the honest median and 1 at the honest 99 % quantile."""
    return np.array(
        [max((row[key] - low) / width for key, (low, width) in scale.items() if key in row) for row in rows]
    )


def summarized(rows: list[dict], without: tuple[str, ...] = ()) -> dict:
    """Return false alarms and, by attack and strength, the ROC of the scores on seeds that set no threshold.

    One factor on all honest ranges is chosen so that 99 % of the honest models that set the scale raise no alarm at
    all; a threshold of each statistic follows from it.
    """
    honest = [row for row in rows if not row["attack"]]
    keys = sorted({key for row in rows for key in row} - {*ABOUT, *without})
    scale = {}
    for key in keys:
        values = np.array([row[key] for row in honest if row["seed"] % 2 == 0 and key in row])
        low, high = np.median(values), np.quantile(values, 0.99)
        scale[key] = (float(low), max(float(high - low), 0.01))
    factor = float(np.quantile(scores([row for row in honest if row["seed"] % 2 == 0], scale), 0.99))
    thresholds = {key: low + factor * width for key, (low, width) in scale.items()}
    clean = scores([row for row in honest if row["seed"] % 2], scale)
    told = []
    for attack, strengths in TAMPERED.items():
        for strength, (_, options) in enumerate(strengths):
            own = [r for r in rows if r["attack"] == attack and r["strength"] == strength and r["seed"] % 2]
            got = scores(own, scale)
            shown = {key: value for key, value in options.items() if key not in ("target", "expected_images")}
            told.append(
                {"attack": attack, "strength": ", ".join(f"{key} {value}" for key, value in shown.items())}
                | {
                    "n": len(got),
                    "auc": area(clean, got),
                    "detected": int((got > factor).sum()),
                    "roc": roc(clean, got),
                }
                | {"seen_by": {key: sum(row.get(key, low) > low for row in own) for key, low in thresholds.items()}}
            )
    alarms = {"n": len(clean), "false_alarms": int((clean > factor).sum())}
    return {"thresholds": thresholds, "honest": alarms, "attacks": told}


def area(clean: np.ndarray, got: np.ndarray) -> float:
    """Return the area under the ROC: the probability that a tampered model scores above an honest one."""
    return float((got[:, None] > clean).mean() + 0.5 * (got[:, None] == clean).mean())


def roc(clean: np.ndarray, got: np.ndarray) -> list[list[float]]:
    """Return the corners of the ROC: the highest true positive rate at each false positive rate where it rises."""
    points: list[list[float]] = []
    for cut in np.unique(np.concatenate([clean, got]))[::-1]:
        false, true = round(float((clean >= cut).mean()), 4), round(float((got >= cut).mean()), 4)
        if points and points[-1][0] == false:
            points.pop()
        if not points or true > points[-1][1]:
            points.append([false, true])
    return points


def labelled(folder: Path, number: int) -> tuple[Tensor, Tensor]:
    """Return (images (n, 3, 32, 32) normalised, labels (n,) by the order of their folders)."""
    paths = list_images(folder, number)
    names = sorted({path.parent.name for path in paths})
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    return read_images(paths, 32, *SCALE), labels


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="image folder by class that trainings use")
    parser.add_argument("--images", type=Path, required=True, help="image folder by class of the client's own images")
    parser.add_argument("--work", type=Path, required=True, help="folder of the rows; a second call continues")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--seeds", type=int, default=8, help="trainings per architecture (default: 8)")
    args = parser.parse_args(argv)
    train, own = labelled(args.train, 1000), labelled(args.images, 500)
    args.work.mkdir(parents=True, exist_ok=True)
    cells = [(name, seed) for seed in range(args.seeds) for name in ARCHITECTURES]
    rows = []
    for name, seed in track(cells, len(cells), "trainings", print):
        file = args.work / f"{name}-{seed}.json"
        if not file.exists():
            write_json(file, rows_of(name, seed, train, own))
        rows += json.loads(file.read_text())
    command = f"python scripts/detector_study.py --train DIR --images DIR --work DIR --output FILE --seeds {args.seeds}"
    honest = sum(not row["attack"] for row in rows)
    write_json(
        args.output,
        {"command": command, "honest_models": honest}
        | {
            "all": summarized(rows),
            "same_layers": summarized(rows, (NEW,)),
            "weights_only": summarized(rows, (NEW, "image_share", "row_share")),
        },
    )
    print(f"{args.output}: {honest} honest models")


if __name__ == "__main__":
    run_command(main)
