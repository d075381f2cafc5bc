"""Top-1 / top-5 accuracy on clean and shuffled images, every image counted exactly once on any number of processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.loaders import chosen, name_unreadable, readable_rows
from models.jigsaw import Jigsaw, shuffle_inputs
from models.position import given_mask
from models.token_jigsaw import TokenJigsaw
from utils.distributed import Processes
from utils.errors import UserError
from utils.progress import track


def shuffled_view(
    model: nn.Module, images: Tensor, index: Tensor, jigsaw: Jigsaw | TokenJigsaw
) -> tuple[Tensor, Tensor | None]:
    """Return what `model` is shown at the jigsaw's ratio: images, permuted, and the mask if it hides positions.

    Every image has its own mask and permutation, fixed by the jigsaw's seed and the image's index in the data set.
    """
    if jigsaw.count == 0:
        return images, None
    tokens = [images.cpu()] if isinstance(jigsaw, TokenJigsaw) else []  # sentences differ in length
    mask, source = jigsaw.draw_for(index.tolist(), *tokens)
    view = shuffle_inputs(images, source, model.patch_size)
    return view, given_mask(model, mask.to(images.device))


def _of_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (cross-entropy, images right, images right in the best 5), summed over the batch, (3,) float64."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([loss.double(), top[:, 0].sum().double(), top.sum().double()])


def _of_attributes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (binary cross-entropy, share of attributes right, images with all right), summed, (3,) float64."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1).sum()
    right = (logits > 0) == (labels > 0)
    return torch.stack([loss.double(), right.double().mean(1).sum(), right.all(dim=1).sum().double()])


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    loader: DataLoader,
    processes: Processes,
    jigsaws: Sequence[Jigsaw | TokenJigsaw],
    log: Callable[[str], None] | None = None,
) -> list[dict]:
    """Return a row per jigsaw, all from a single pass over the data, identical on every process.

    Row: mask_ratio, acc1 and acc5 in percent (higher is better; acc5 counts the best 5, or all, classes), loss (mean
    cross-entropy in nats), images counted, skipped (unreadable) and, where any were, skipped_files, their names. Of
    attributes acc1 is the percentage of them that are right, acc5 that of images with all right, and loss the mean
    binary cross-entropy. Raises UserError when nothing could be counted.
    """
    model.eval()
    sums = torch.zeros(len(jigsaws), 3, dtype=torch.float64, device=processes.device)  # loss, top-1, top-5
    count, unreadable = torch.zeros(1, dtype=torch.float64, device=processes.device), []
    for batch in track(loader, len(loader), "evaluate", log):
        readable = readable_rows(batch.labels)
        count += readable.sum().to(count)
        unreadable += batch.index[~readable].tolist()
        if not readable.any():
            continue
        parts = (chosen(part, readable) for part in (batch.images, batch.labels))
        images, labels = (part.to(processes.device, non_blocking=True) for part in parts)
        for row, jigsaw in enumerate(jigsaws):
            view, mask = shuffled_view(model, images, batch.index[readable], jigsaw)
            logits = model(view, mask).float()
            sums[row] += _of_attributes(logits, labels) if labels.dim() == 2 else _of_classes(logits, labels)
    images, skipped = int(processes.sum(count)), name_unreadable(loader.dataset, unreadable, processes, log)
    if images == 0:
        raise UserError(f"no image could be evaluated ({len(skipped)} unreadable)")
    sums = processes.sum(sums)
    if not sums.isfinite().all():
        raise UserError("the model's outputs are NaN or infinite: its weights are damaged, use an earlier checkpoint")
    return [
        {
            "mask_ratio": jigsaw.mask_ratio,
            "acc1": 100 * top1 / images,
            "acc5": 100 * top5 / images,
            "loss": loss / images,
            "images": images,
            "skipped": len(skipped),
        }
        | ({"skipped_files": skipped} if skipped else {})
        for jigsaw, (loss, top1, top5) in zip(jigsaws, sums.tolist(), strict=True)
    ]
