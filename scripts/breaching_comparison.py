"""Bins of images beside those of breaching: the same victims, private batches and numbers of bins.

    pip install breaching
    python scripts/breaching_comparison.py --images DIR --public DIR --output docs/results/breaching_bins.json

Rows: `ours`, our block and our reader; `same bins`, breaching's block, set to our functional and thresholds, read by
breaching; `same leak`, that leak read by our reader; `as shipped`, breaching's block with its own functional (a cosine
of mode 32) and thresholds. An image counts as recovered where one of the pictures returned is above 30 dB. Guarantees
are those of both codes. Images, victims and labels are those of scripts/server_study.py. Seconds are of this process.
Cost: 13 minutes of a busy core.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.malicious.bins import expected_share, read_rows
from attacks.malicious.imprint_block import ImprintBlock
from attacks.malicious.imprint_server import Imprint
from attacks.malicious.server import Knowledge
from attacks.threat_model.client import prepare, share
from data.images import list_images, read_images
from data.transforms import denormalize
from models import build_model
from models.jigsaw import Jigsaw
from scripts.server_study import BATCHES, GOOD, PUBLIC, REPEATS, SCALE, VICTIMS, psnr_best, sent, spread
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.tool_parser import ToolParser

BINS = 512
SETUP = {"device": torch.device("cpu"), "dtype": torch.float}


def open_breaching() -> ModuleType:
    """Return breaching, with its warnings kept off the terminal. Raises UserError where it is not installed."""
    if importlib.util.find_spec("breaching") is None:
        raise UserError("breaching is not installed, and this script compares with it: pip install breaching")
    warnings.simplefilter("ignore")
    for part in ("cases.servers", "attacks", "analysis.imprint_guarantee"):
        importlib.import_module(f"breaching.{part}")
    return importlib.import_module("breaching")


def breached(
    breaching: ModuleType, victim: str, images: Tensor, labels: Tensor, seed: int, bins: ImprintBlock | None
) -> tuple[Tensor, list[Tensor]]:
    """Return (the pictures breaching reads, normalised, the gradients of its block's weight and bias).

    bins: the block whose functional and thresholds its own takes; None leaves it as it is shipped.
    """
    name, options = VICTIMS[victim]
    model = build_model(name, seed=seed, **options).eval()
    model.name = name  # breaching asks for it
    with contextlib.redirect_stdout(io.StringIO()):
        case = breaching.get_case_config("6_large_batch_cifar", overrides=["server=malicious-model-rtf"])
        reader = breaching.get_attack_config("imprint")
        case.data.mean, case.data.std = list(SCALE["mean"]), list(SCALE["std"])
        case.server.model_modification.num_bins = BINS
        loss = nn.CrossEntropyLoss()
        server = breaching.cases.servers.construct_server(model, loss, case, SETUP)
        model = server.vet_model(model)
    block = next(part for part in model.modules() if type(part).__name__ == "ImprintBlock")
    if bins is not None:
        with torch.no_grad():
            block.linear0.weight.copy_(bins.weight[0])
            block.linear0.bias.copy_(bins.bias[0])
    payload = server.distribute_payload()
    wanted = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(images), labels), wanted)
    about = {"num_data_points": len(images), "labels": labels.sort()[0], "local_hyperparams": None}
    shared = {"gradients": list(gradients), "buffers": None, "metadata": about}
    attacker = breaching.attacks.prepare_attack(model, loss, reader, SETUP)
    found, _ = attacker.reconstruct([payload], [shared], server.secrets)
    own = [next(g for p, g in zip(wanted, gradients, strict=True) if p is part) for part in block.linear0.parameters()]
    return found["data"], own


def recovered(found: Tensor, truth: Tensor) -> float:
    """Return the share of true images (B, C, H, W) that one of the found ones (F, C, H, W) equals above GOOD dB."""
    found, truth = (denormalize(value.float(), **SCALE).flatten(1) for value in (found, truth))
    return float((psnr_best(found[found.isfinite().all(dim=1)], truth)[0] > GOOD).double().mean())


def unit_bins(block: ImprintBlock, public: Tensor) -> ImprintBlock:
    """Return the block with its functional in units of its deviation over public pictures: breaching's block adds up
    what its rows give, and is made for a functional of deviation 1. The bins stay what they are."""
    values = public.flatten(1).double() @ block.functional
    with torch.no_grad():
        block.weight /= float(values.std())
        block.bias /= float(values.std())
    block.edges, block.functional = block.edges / values.std(), block.functional / values.std()
    return block


def measured(breaching: ModuleType, victim: str, batch: int, images: Tensor, public: Tensor, repeat: int) -> dict:
    """Return the shares of one batch, and the seconds of client and reader together."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + repeat))[:batch]
    labels = torch.randint(100, (batch,), generator=torch.Generator().manual_seed(2000 + repeat))
    server, knowledge = Imprint(bins=BINS), Knowledge((3, 32, 32), SCALE["mean"], SCALE["std"], public)
    model = sent(victim, server, knowledge, repeat)
    start = time.perf_counter()
    private = prepare(model, images[order], labels, Jigsaw(model.grid, 0.0, seed=repeat), 0)
    leak = share(model, private, lambda gradients, step: gradients, False, **SCALE)
    ours = ATTACKS["imprint"](leak, generator=torch.Generator().manual_seed(repeat))
    seconds = [time.perf_counter() - start]
    block = unit_bins(model.imprint, public)
    rows = {"ours": recovered(ours.images[: ours.diagnostics["found"]], images[order])}
    for key, bins in (("same_bins", block), ("as_shipped", None)):
        start = time.perf_counter()
        found, gradients = breached(breaching, victim, images[order], labels, repeat, bins)
        seconds.append(time.perf_counter() - start)
        rows[key] = recovered(found, images[order])
        if bins is not None:
            hits = read_rows(gradients[0][None], gradients[1][None], block.functional, block.edges, cumulative=True)
            rows["same_leak"] = recovered(hits.inputs.reshape(-1, 3, 32, 32), images[order])
    return rows | dict(zip(("seconds_ours", "seconds_same_bins", "seconds_as_shipped"), seconds, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of private pictures")
    parser.add_argument("--public", type=Path, required=True, help="folder of the server's pictures")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(argv)
    breaching = open_breaching()
    images, public = (
        read_images(list_images(folder, number), 32, **SCALE)
        for folder, number in ((args.images, 2000), (args.public, PUBLIC))
    )
    cells = []
    for victim in ("cnn", "vit"):
        for batch in BATCHES:
            rows = [measured(breaching, victim, batch, images, public, repeat) for repeat in range(REPEATS)]
            theirs = breaching.analysis.imprint_guarantee.expected_amount(BINS, batch) / batch
            promised = {"promised": expected_share([1 / BINS] * BINS, batch, PUBLIC), "promised_breaching": theirs}
            cells.append({"victim": victim, "batch": batch, "n": REPEATS, **promised} | spread(rows))
            print(cells[-1], flush=True)
    command = "python scripts/breaching_comparison.py --images DIR --public DIR --output FILE"
    about = {"command": command, "breaching": version("breaching"), "torch": torch.__version__, "bins": BINS}
    write_json(args.output, about | {"public": PUBLIC, "recovered_above_db": GOOD, "cells": cells})


if __name__ == "__main__":
    run_command(main)
