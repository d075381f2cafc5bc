"""What malicious servers recover on a CNN and on ViTs: by batch size, mask ratio of MJP, and clients in the sum.

    python scripts/server_study.py --images DIR --public DIR --work DIR --output docs/results/servers.json

DIR of --images: private pictures by class (CIFAR-10, val), of --public: the server's (train). An image or patch counts
as recovered above 30 dB of what the client's model saw, which MJP has shuffled; `in_place` is against the picture
itself. Every cell is repeated with other images, victims and masks. Cost: 100 minutes of a busy core (estimate from 16
of 69 cells). Resumable: finished cells are kept in --work.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.malicious import SERVERS
from attacks.malicious.imprint_server import trap_share
from attacks.malicious.server import Knowledge, Server
from attacks.threat_model.client import Aggregation, PrivateBatch, prepare, share
from attacks.threat_model.leak import Leak
from data.images import list_images, read_images
from data.transforms import denormalize
from models import build_model
from models.jigsaw import Jigsaw, patchify
from models.partial import Adapters
from utils.errors import run_command
from utils.files import write_json
from utils.progress import track
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
GOOD, REPEATS, PUBLIC = 30.0, 3, 1000
VIT = {"image_size": 32, "patch_size": 8, "num_heads": 4, "num_classes": 100, "embed_dim": 128, "depth": 3}
WIDE = VIT | {"embed_dim": 256, "depth": 6}  # adapters that keep all pixels of a patch apart from its place
VICTIMS = {
    "cnn": ("lenet", {"num_classes": 100}),
    "vit": ("vit", VIT),
    "mjp": ("vit", VIT | {"unknown": True}),
    "wide": ("vit", WIDE),
    "wide mjp": ("vit", WIDE | {"unknown": True}),
}
BATCHES, RATIOS, CLIENTS = (8, 16, 32, 64, 128, 256), (0.0, 0.1, 0.27, 0.5, 0.7, 0.9), (1, 4, 16, 64)
PARTS = ("batch", "kind", "mask", "clients", "dropout", "fishing")
DROPOUTS = (0.0, 0.25, 0.5)
STRENGTHS = {"class_fishing": ({"margin": 10.0, "kept": 0.5}, {"margin": 20.0, "kept": 0.1}, {}),
             "feature_fishing": ({"slope": 3.0, "kept": 0.5}, {"slope": 30.0, "kept": 0.1}, {})}  # fmt: skip


def cells() -> list[dict]:
    """Return every cell: what is attacked, and how."""
    bins, patch, adapters = (
        ("imprint", {"bins": 512}),
        ("imprint", {"bins": 64, "reads": "place"}),
        ("adapter_imprint", {}),
    )
    found = [cell("batch", victim, bins, batch=b) for victim in ("cnn", "vit") for b in BATCHES]
    kinds = [("imprint", {"bins": 512, "structure": "sparse"}), ("trap_weights", {"rows": 512})]
    kinds += [("imprint", {"bins": 512, "disguise": d}) for d in (1.0, 3.0, 20.0)]
    kinds += [("imprint", {"bins": 512, "functional": f}) for f in ("cosine", "random")]
    found += [cell("kind", "vit", kind, batch=64) for kind in kinds]
    for ratio in RATIOS:
        found.append(cell("mask", "mjp", bins, batch=64, ratio=ratio))
        found.append(cell("mask", "mjp", patch, batch=8, ratio=ratio))
        found.append(cell("mask", "wide mjp", adapters, batch=8, ratio=ratio))
    for clients in CLIENTS:
        found += [cell("clients", "mjp", bins, batch=8, ratio=ratio, clients=clients) for ratio in (0.0, 0.5)]
        found += [cell("clients", "wide mjp", adapters, batch=1, ratio=ratio, clients=clients) for ratio in (0.0, 0.5)]
    for dropout in DROPOUTS:
        found.append(cell("dropout", "mjp", bins, batch=8, ratio=0.5, clients=16, dropout=dropout))
        found.append(cell("dropout", "wide mjp", adapters, batch=1, ratio=0.5, clients=16, dropout=dropout))
    return found


def cell(part: str, victim: str, server: tuple[str, dict], *, batch: int, ratio: float = 0.0, **clients) -> dict:
    """Return one cell. clients: how many, and of the `dropout` part the share that drops out."""
    name, options = server
    about = {"part": part, "victim": victim, "server": name, "options": options}
    return about | {"batch": batch, "ratio": ratio, "clients": 1} | clients


def sent(victim: str, server: Server, knowledge: Knowledge, seed: int) -> nn.Module:
    """Return the model that the server sends to its clients."""
    name, options = VICTIMS[victim]
    model = build_model(name, seed=seed, **options).eval()
    if victim.startswith("wide"):
        model = Adapters(rank=128).apply(model, seed)
    return server.tamper(model, knowledge, generator=torch.Generator().manual_seed(seed)).eval()


def summed(model: nn.Module, images: Tensor, labels: Tensor, one: dict, seed: int) -> tuple[list[PrivateBatch], Leak]:
    """Return the clients' batches, each with its own mask, and the mean of what they share."""
    jigsaw = Jigsaw(model.grid, one["ratio"], "uniform", seed=seed)
    privates, total, leak = [], {}, None
    for client in range(one["clients"]):
        part = slice(client * one["batch"], (client + 1) * one["batch"])
        privates.append(prepare(model, images[part], labels[part], jigsaw, client))
        leak = share(model, privates[-1], lambda gradients, step: gradients, False, **SCALE)
        for name, value in leak.gradients.items():
            total[name] = total.get(name, 0) + value / one["clients"]
    return privates, replace(leak, gradients=total, batch_size=one["batch"] * one["clients"])


def left(one: dict, repeat: int) -> int:
    """Return how many clients of a cell are in the sum."""
    together = Aggregation(one["clients"], 1, dropout=one.get("dropout", 0.0))
    return len(together.left(one["clients"], torch.Generator().manual_seed(3000 + repeat)))


def psnr_best(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best PSNR of each true row (B, P) over found ones (F, P), and of each found one over the true ones."""
    if not len(found):
        return torch.full((len(truth),), -torch.inf), torch.zeros(0)
    error = torch.cdist(truth.double(), found.double().clamp(0, 1)).square() / truth.shape[1]
    decibels = -10 * torch.log10(error.clamp_min(1e-30))
    return decibels.amax(dim=1), decibels.amax(dim=0)


def measured(one: dict, images: Tensor, knowledge: Knowledge, repeat: int) -> dict:
    """Return the scores of one repetition of a cell."""
    server = SERVERS[one["server"]](**one["options"])
    one = one | {"clients": left(one, repeat)}
    number = one["batch"] * one["clients"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + repeat))[:number]
    labels = torch.randint(100, (number,), generator=torch.Generator().manual_seed(2000 + repeat))
    model = sent(one["victim"], server, knowledge, repeat)
    privates, leak = summed(model, images[order], labels, one, repeat)
    result = ATTACKS[server.attack](leak, generator=torch.Generator().manual_seed(repeat))
    true, shown, got = (
        denormalize(value.float(), **SCALE)
        for value in (
            torch.cat([private.images for private in privates]),
            torch.cat([private.model_input for private in privates]),
            result.images[: result.diagnostics["found"]],
        )
    )
    rows, claimed = psnr_best(got.flatten(1), shown.flatten(1))
    row = {"images": float((rows > GOOD).double().mean()), "claimed": result.diagnostics["claimed"] / number}
    row["false_claims"] = int((claimed[: result.diagnostics["claimed"]] <= GOOD).sum())
    row["in_place"] = float((psnr_best(got.flatten(1), true.flatten(1))[0] > GOOD).double().mean())
    if one["part"] in ("batch", "kind"):
        return row | promised(server, model, one, knowledge, torch.zeros(number, 1, dtype=torch.bool))
    side = model.patch_size
    cut = [patchify(value, side) for value in (got, shown)]  # (F, N, P), (B, N, P)
    hidden = torch.cat([private.mask.expand(one["batch"], -1) for private in privates])
    patches = psnr_best(cut[0].flatten(0, 1), cut[1].flatten(0, 1))[0].reshape(hidden.shape) > GOOD
    for name, chosen in (("visible", ~hidden), ("hidden", hidden)):
        row[name] = float(patches[chosen].double().mean()) if chosen.any() else None
    return row | promised(server, model, one, knowledge, hidden)


def promised(server: Server, model: nn.Module, one: dict, knowledge: Knowledge, hidden: Tensor) -> dict:
    """Return the share that the server's guarantee states for this cell, of images or of patches."""
    number = one["batch"] * one["clients"]
    if server.attack == "adapter_imprint":
        places, unknown = server.rows(model)
        counts = (~hidden).sum(dim=0).tolist()  # tokens with the code of each place
        alone = [count * server.guarantee(count, PUBLIC, rows=places) for count in counts if count]
        seen = sum(alone) / sum(counts) if sum(counts) else None
        masked = int(hidden.sum())
        loose = server.guarantee(masked, PUBLIC * hidden.shape[1], rows=unknown) if masked else None
        return {"promised_visible": seen, "promised_hidden": loose}
    if one["server"] == "trap_weights":
        cells = model.imprint.cells(knowledge.public) @ model.imprint.weight[0].T + model.imprint.bias[0]
        return {"promised": trap_share(cells[:, 0] > 0, number)}
    share_of = server.guarantee(number, PUBLIC)
    return {"promised_visible": share_of} if one["options"].get("reads") == "place" else {"promised": share_of}


def fishing_plans() -> list[dict]:
    """Return what is fished with, on which victim, and of how many clients; the strongest settings are the defaults."""
    target = {"class_fishing": 7, "feature_fishing": 99}
    plans = [("class_fishing", {}, "vit", 0.0, 4), ("class_fishing", {}, "mjp", 0.27, 1),
             ("feature_fishing", {}, "vit", 0.0, 4), ("feature_fishing", {}, "mjp", 0.27, 1)]  # fmt: skip
    plans = [(name, options, "vit", 0.0, 1) for name, some in STRENGTHS.items() for options in some] + plans
    return [
        {"server": name, "options": options | {"target": target[name]}, "victim": victim, "ratio": ratio}
        | {"batch": 64, "clients": clients}
        for name, options, victim, ratio, clients in plans
    ]


def fished(one: dict, images: Tensor, knowledge: Knowledge, repeats: int) -> dict:
    """Return how often one image passes alone, and its PSNR by an honest attack."""
    name, number = one["server"], one["batch"] * one["clients"]
    given = one["options"] | ({"expected_images": number} if name == "feature_fishing" else {})
    server = SERVERS[name](**given)
    model = sent(one["victim"], server, knowledge, 0)
    alone, scores, exact = [], [], []
    for repeat in range(repeats):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(repeat))[:number]
        top = 99 if name == "feature_fishing" else 100  # no image of the class that the feature is fished with
        labels = torch.randint(top, (number,), generator=torch.Generator().manual_seed(repeat))
        privates, leak = summed(model, images[order], labels, one, repeat)
        base = "mjp_aware" if one["ratio"] else "closed_form"
        found = ATTACKS["fishing"](leak, generator=torch.Generator().manual_seed(repeat), base=base)
        alone.append(abs(found.diagnostics["passed"] - 1) < 0.01)
        if alone[-1]:
            seen = denormalize(torch.cat([private.model_input for private in privates]).float(), **SCALE)
            got, side = denormalize(found.images[:1].float(), **SCALE), model.patch_size
            visible = ~privates[0].mask[0]
            cut = [patchify(value, side)[:, visible].flatten(1) for value in (got, seen)]
            scores.append(float(psnr_best(*cut)[0].max()))
            exact.append(bool(found.diagnostics["isolated_exact"]))
    promise = server.guarantee(number, **({"classes": 100} if name == "class_fishing" else {"public": PUBLIC}))
    about = {"rounds": repeats, "alone": sum(alone), "promised": promise * number, "exact": sum(exact)}
    about["psnr_median"] = statistics.median(scores) if scores else None
    return one | about | {"psnr_smallest": min(scores) if scores else None}


def spread(rows: list[dict]) -> dict:
    """Return {score: {"mean", "smallest", "largest"}} over repetitions, None where a score does not apply."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {
        key: {"mean": statistics.fmean(own), "smallest": min(own), "largest": max(own)} if own else None
        for key, own in values.items()
    }


def label(one: dict) -> str:
    """Return a name of a cell for a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", json.dumps(one)).strip("-")


def kept(file: Path, compute: Callable[[], object]) -> object:
    """Return what the file holds, computed and written first where it is not there."""
    if not file.exists():
        write_json(file, compute())
    return json.loads(file.read_text())


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of private pictures")
    parser.add_argument("--public", type=Path, required=True, help="folder of the server's pictures")
    parser.add_argument("--work", type=Path, required=True, help="folder of finished cells")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--only", choices=PARTS, help="compute this part and take the others from --output")
    args = parser.parse_args(argv)
    images, public = (
        read_images(list_images(folder, number), 32, **SCALE)
        for folder, number in ((args.images, 2000), (args.public, PUBLIC))
    )
    args.work.mkdir(parents=True, exist_ok=True)
    knowledge, found = Knowledge((3, 32, 32), SCALE["mean"], SCALE["std"], public), []
    before = json.loads(args.output.read_text()) if args.only else {"cells": [], "fishing": []}
    planned = [one for one in cells() if args.only in (None, one["part"])]
    for one in track(planned, len(planned), "cells", print):
        rows = kept(
            args.work / f"{label(one)}.json",
            lambda one=one: [measured(one, images, knowledge, repeat) for repeat in range(REPEATS)],
        )
        found.append(one | {"n": REPEATS} | spread(rows))
    found = [one for one in before["cells"] if one["part"] != args.only] + found
    fishing = before["fishing"]
    if args.only in (None, "fishing"):
        plans = fishing_plans()
        fishing = [
            kept(args.work / f"fishing-{label(one)}.json", lambda one=one: fished(one, images, knowledge, 40))
            for one in track(plans, len(plans), "fishing", print)
        ]
    command = "python scripts/server_study.py --images DIR --public DIR --work DIR --output FILE"
    write_json(args.output, {"command": command, "public": PUBLIC, "recovered_above_db": GOOD, "cells": found} | {
        "fishing": fishing})  # fmt: skip
    print(f"{args.output}: {len(found)} cells")


if __name__ == "__main__":
    run_command(main)
