"""Top-1 / top-5 accuracy on clean and shuffled images, every image counted exactly once on any number of processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence

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

    def score(images: Tensor, labels: Tensor, index: Tensor) -> Iterator[Tensor]:
        for jigsaw in jigsaws:
            view, mask = shuffled_view(model, images, index, jigsaw)
            logits = model(view, mask).float()
            yield _of_attributes(logits, labels) if labels.dim() == 2 else _of_classes(logits, labels)

    sums, counts = sum_over_images(loader, processes, len(jigsaws), score, "evaluate", log)
    images = counts["images"]
    return [
        {
            "mask_ratio": jigsaw.mask_ratio,
            "acc1": 100 * top1 / images,
            "acc5": 100 * top5 / images,
            "loss": loss / images,
        }
        | counts
        for jigsaw, (loss, top1, top5) in zip(jigsaws, sums, strict=True)
    ]


def sum_over_images(
    loader: DataLoader,
    processes: Processes,
    rows: int,
    score: Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]],
    what: str,
    log: Callable[[str], None] | None,
) -> tuple[list[list[float]], dict]:
    """Return sums (rows, 3) over the readable images of all processes, and what a row says of how many there were.

    Raises UserError when nothing could be counted or a sum is not finite.

    Args:
        rows: how many, one for each jigsaw.
        score: of images (B, C, H, W), labels and indices in the data set: what is added to each row, (3,) float64.
        what: the name of the progress.
        log: gets the progress and the unreadable files.
    """
    sums = torch.zeros(rows, 3, dtype=torch.float64, device=processes.device)
    count, unreadable = torch.zeros(1, dtype=torch.float64, device=processes.device), []
    for batch in track(loader, len(loader), what, log):
        readable = readable_rows(batch.labels)
        count += readable.sum().to(count)
        unreadable += batch.index[~readable].tolist()
        if not readable.any():
            continue
        parts = (chosen(part, readable) for part in (batch.images, batch.labels))
        images, labels = (part.to(processes.device, non_blocking=True) for part in parts)
        for row, added in enumerate(score(images, labels, batch.index[readable])):
            sums[row] += added
    images, skipped = int(processes.sum(count)), name_unreadable(loader.dataset, unreadable, processes, log)
    if images == 0:
        raise UserError(f"no image could be evaluated ({len(skipped)} unreadable)")
    sums = processes.sum(sums)
    if not sums.isfinite().all():
        raise UserError("the model's outputs are NaN or infinite: its weights are damaged, use an earlier checkpoint")
    return sums.tolist(), {"images": images, "skipped": len(skipped)} | ({"skipped_files": skipped} if skipped else {})
