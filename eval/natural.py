"""ImageNet-A and ImageNet-O: photographs models get wrong, and photographs of things they were never taught.

Both come as class folders of 200 of ImageNet's classes (Hendrycks et al., "Natural Adversarial Examples", CVPR 2021);
only the outputs of those 200 compete. Which they are is read from the folders: their names are looked up among the
class names in the checkpoint or, for a model of 1000 outputs that recorded none, among ImageNet's synsets.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.folders import ImageFolder, read_class_list
from data.loaders import batches_of_share, evaluated_as, name_unreadable
from data.options import DataOptions
from eval.calibration import calibration, detection, predictions
from eval.options import SubjectOptions
from eval.subject import Inputs, open_model, outputs_of
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes
from utils.progress import track


def open_folder(
    root: str | Path, peers: Processes, inputs: Inputs, limit: int | None, classes: list[str] | None = None
) -> DataLoader:
    """Open this process's share of `root/<class>/<image>`, which stands for the data's path, in batches.

    limit: use that many images, spread evenly over the set. classes: only these folders, instead of data.classes.
    """
    data = inputs.data
    if data.dataset != "folder":
        raise UserError(f"this suite reads class folders, not dataset '{data.dataset}': leave out --data.dataset")
    listed = read_class_list(data.classes) if data.classes else None
    base = ImageFolder(Path(root), classes or listed)
    return batches_of_share(base, evaluated_as(data, inputs.recipe), peers, data, limit)


@torch.inference_mode()
def collect_logits(
    model: nn.Module,
    loader: DataLoader,
    peers: Processes,
    columns: Sequence[int] | None = None,
    log: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor, list[str]]:
    """Return logits (N, K) float32 and labels (N,) in the data set's order, and the names of unreadable images.

    The same on every process. columns: keep only these outputs. Raises UserError when no image could be read.
    """
    model.eval()
    rows, unreadable = [], []
    for batch in track(loader, len(loader), "evaluate", log):
        readable = batch.labels >= 0
        unreadable += batch.index[~readable].tolist()
        if readable.any():
            logits = model(batch.images[readable].to(peers.device), None).float().cpu()
            logits = logits if columns is None else logits[:, columns]
            rows.append((batch.index[readable], logits, batch.labels[readable]))
    rows, skipped = peers.gather(rows), name_unreadable(loader.dataset, unreadable, peers, log)
    if not rows:
        raise UserError("no image could be evaluated: all are unreadable")
    index, logits, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
    order = index.argsort()
    return logits[order], labels[order], skipped


def required(path: str | None, option: str, what: str) -> str:
    """Return the value of an option that a suite cannot do without."""
    if path is None:
        raise UserError(f"--{option} is missing: {what}")
    return path


def tell(row: dict, log: Callable[[str], None] | None) -> dict:
    """Return the row itself, after a line for each of its entries."""
    for name, value in row.items() if log else ():
        if isinstance(value, float):
            log(f"{name.replace('_', ' '):24s} {value:10.4f}")
        elif isinstance(value, int):  # the log has named the skipped files
            log(f"{name:24s} {value:10d}")
    return row


def left_out(names: list[str]) -> dict:
    """Return what a row says of unreadable images: how many and, where there are any, which."""
    return {"skipped": len(names)} | ({"skipped_files": names} if names else {})


def imagenet_a(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    seed: int = 0,
    limit: int | None = None,
    legacy: bool = False,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"imagenet_a": [row of `calibration`, skipped]} of the class folders in data.path.

    model, data, seed: as for `open_model`. legacy: see `calibration`.
    """
    root = required(data.path, "data.path", "the folder of ImageNet-A, with one folder per class")
    network, inputs = open_model(peers, model, data, seed=seed, notes=notes)
    loader = open_folder(root, peers, inputs, limit)
    logits, labels, skipped = collect_logits(network, loader, peers, outputs_of(network, loader, notes), log)
    return {"imagenet_a": [tell(calibration(logits, labels, legacy=legacy) | left_out(skipped), log)]}


def imagenet_o(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    seed: int = 0,
    known: str | None,
    limit: int | None = None,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"imagenet_o": [row of `detection`, images, known_images, skipped]}: are foreign images told from ordinary
    ones?

    data.path: class folders of foreign images; known: class folders of ordinary ones, such as ImageNet's val folder,
    of which the same classes are used. The anomaly score is minus the maximum softmax probability. limit: images of
    either kind. model, data, seed: as for `open_model`.
    """
    root = required(data.path, "data.path", "the folder of ImageNet-O, with one folder per class")
    known = required(known, "known", "ImageNet's val folder, whose images of the same classes ImageNet-O is told from")
    network, inputs = open_model(peers, model, data, seed=seed, notes=notes)
    foreign = open_folder(root, peers, inputs, limit)
    ordinary = open_folder(known, peers, inputs, limit, foreign.dataset.base.classes)
    scores, unreadable = [], []
    for loader in (foreign, ordinary):
        logits, labels, skipped = collect_logits(network, loader, peers, outputs_of(network, loader, notes), log)
        scores.append(-predictions(logits, labels)[0])
        unreadable += skipped
    counts = {"images": len(scores[0]), "known_images": len(scores[1]), **left_out(unreadable)}
    return {"imagenet_o": [tell(detection(*scores) | counts, log)]}


def labelled_set(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    seed: int = 0,
    limit: int | None = None,
    legacy: bool = False,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"calibration": [row of `calibration`, skipped]} of the validation split of any data set, over all
    outputs.

    Options as for `imagenet_a`; data.path has the layout that accuracy is measured on.
    """
    network, inputs = open_model(peers, model, data, seed=seed, notes=notes)
    loader = inputs.open(peers, limit)
    loader.dataset.label_map = outputs_of(network, loader, notes)
    logits, labels, skipped = collect_logits(network, loader, peers, None, log)
    return {"calibration": [tell(calibration(logits, labels, legacy=legacy) | left_out(skipped), log)]}
