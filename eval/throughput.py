"""Images a model classifies in a second: the measurement that the official MJP code calls --throughput."""

import time
from collections.abc import Callable

import torch

from data.options import DataOptions
from eval.options import SubjectOptions
from eval.subject import open_model
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes

WARM_UP, PASSES = 50, 30  # forward passes before the clock starts, and under it


@torch.inference_mode()
def throughput(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"throughput": {...}}: images per second of this process, over PASSES forward passes of one batch.

    The batch is the first of the validation split, on the device before the clock starts; no image is shuffled. model,
    data, seed: as for `open_model`. Raises UserError where no image of the batch can be read.
    """
    network, inputs = open_model(peers, model, data, seed=seed, notes=notes)
    network.eval()
    batch = next(iter(inputs.open(peers)))
    images = batch.images[batch.labels >= 0].to(peers.device)
    if not len(images):
        raise UserError("--throughput: no image of the first batch can be read: replace or remove them")
    for _ in range(WARM_UP):
        network(images)
    _wait(peers.device)
    started = time.perf_counter()
    for _ in range(PASSES):
        network(images)
    _wait(peers.device)
    rate = PASSES * len(images) / (time.perf_counter() - started)
    if log:
        log(f"throughput: {rate:.1f} images/s in batches of {len(images)} ({PASSES} passes on {peers.device})")
    found = {"images_per_second": rate, "batch_size": len(images), "passes": PASSES, "device": str(peers.device)}
    return {"throughput": found}


def _wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
